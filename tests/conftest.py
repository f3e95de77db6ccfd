"""Fixtures: a policy small enough for any machine, configs composed into temporary folders, an MLflow store."""

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from experiments.tiny_policy.policy import TINY_INSTRUCTION, random_policy, train_tokenizer
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.utils.machine import register_machine_resolvers
from tests.programs import Programs

ROOT = Path(__file__).resolve().parents[1]
register_machine_resolvers()  # configs use them

SENTENCES = [
    "Return the sorted copy of a list of numbers.",
    "Compute the shortest path between two nodes of a graph.",
    "Read a table from a file and return its columns.",
    "Raise an error when the shape of the array does not match.",
    "Split the text into words and count each of them.",
    "Draw random samples from a normal distribution.",
    "Open a connection to the database and run the query.",
    "Solve a linear system with the conjugate gradient method.",
    "Parse the arguments of the command line.",
    "Write the model and its weights to a folder.",
    "Name the terms that matter, then sum the text up.",
    "Train a classifier on labelled documents.",
]
"""The tokenizer's training data."""


@pytest.fixture(scope="session")
def tiny_policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder with a tiny policy: random weights, 2 layers of 32, a byte-level tokenizer of 320 ids, a ChatML template."""
    folder = tmp_path_factory.mktemp("tiny_policy")
    tokenizer = train_tokenizer(SENTENCES * 3, vocab_size=320)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    random_policy(tokenizer, **sizes, max_position_embeddings=4096).model.save_pretrained(folder)  # for the published lengths
    tokenizer.save_pretrained(folder)
    EncoderSettings(instruction=TINY_INSTRUCTION, max_prompt_tokens=96, max_new_tokens=8).save(folder)
    return folder


@pytest.fixture
def tiny_policy(tiny_policy_folder: Path) -> Policy:
    """A tiny policy that may be changed."""
    return Policy.load(str(tiny_policy_folder))


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow SQLite store, created once: its first use takes seconds."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Starts the project's programs; imports are done once."""
    with Programs(tmp_path_factory.mktemp("programs")) as programs:
        yield programs


@pytest.fixture
def run_train(programs: Programs) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """(*overrides) -> result of `python train.py` with them."""
    environment = {key: value for key, value in os.environ.items() if key != "PROJECT_ROOT"}
    return functools.partial(programs.run, "train.py", env=environment)


@pytest.fixture
def places(tracking_uri: str, tiny_policy_folder: Path, tmp_path: Path) -> list[str]:
    """A tiny policy, few and small packages, and everything written below `tmp_path`."""
    return [
        *("experiment=tiny_sup", f"policy.path={tiny_policy_folder}", f"project={tmp_path.name}"),
        *(f"hydra.run.dir={tmp_path}/out", f"paths.output_root={tmp_path}/outputs", f"paths.cache_dir={tmp_path}/cache"),
        *(f"paths.tracking_uri={tracking_uri}", f"paths.artifact_location=file://{tmp_path}/artifacts"),
        *("packages.train=[urllib3]", "packages.validation=[rich]", "packages.test=[networkx]"),
    ]


Compose = Callable[..., DictConfig]
"""(overrides, config_name="train") -> a composed config."""


@pytest.fixture
def compose(tmp_path: Path, tiny_policy_folder: Path) -> Iterator[Compose]:
    """Composes a config as the command line would, with all output in `tmp_path` and the tiny policy as `policy.path`.

    Docstrings are read once, into the project's own `paths.cache_dir`.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        runs = itertools.count()

        def composed(*overrides: str, config_name: str = "train") -> DictConfig:
            named = any(re.match(r"~?experiment\b", override) for override in overrides)
            small = [] if named or config_name != "train" else ["experiment=tiny_sup"]  # the default's model is larger
            cfg = hydra_compose(config_name=config_name, overrides=[*small, *overrides])
            with open_dict(cfg):
                cfg.paths.output_dir = str(tmp_path / f"output{next(runs) or ''}")  # a folder holds one run
                cfg.paths.artifact_location = f"file://{tmp_path}/mlartifacts"
                cfg.paths.tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
                if config_name == "evaluate":
                    cfg.results_dir, cfg.embeddings.folder = str(tmp_path / "mteb"), str(tmp_path / "embeddings")
                if "path" in list(cfg.get("policy") or {}):  # `in` on the config is False for ???
                    cfg.policy.path = str(tiny_policy_folder)
            return cfg

        yield composed
    GlobalHydra.instance().clear()
