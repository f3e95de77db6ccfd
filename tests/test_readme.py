"""The commands of README.md, CONTRIBUTING.md and docs/, run or composed on CPUs and without a network."""

import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra.utils import instantiate
from omegaconf import OmegaConf

import evaluate
from src.evaluation.benchmarks import named_tasks
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.objectives import rewards
from src.modules.policy.model import Policy
from tests.conftest import ROOT
from tests.datamodules.builders import write_triplets
from train import train

PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", *(ROOT / "docs").glob("*.md"))
}

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

SMALL = [
    *("logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1", "datamodule.seed=0"),
    *("rollout.max_new_tokens=4", "module.num_generations=2"),
    "callbacks.metrics.figure_path=null",  # drawing takes longer than the rest; tests/test_train.py draws
]

ONLY_GRACE = ("module.num_generations", "datamodule.seed")
"""Settings above that a baseline does not have or need."""

SETTINGS = {"abilities", "algorithm", "callbacks", "datamodule", "embeddings", "module", "paths", "policy", "reward", "rollout", "trainer"}
"""Groups of settings; what the pages say of them in running text is compared with the configs."""


def blocks(language: str, *pages: str) -> list[str]:
    """Returns the fenced blocks of a language, of all pages or those named."""
    texts = [text for page, text in PAGES.items() if not pages or page.name in pages]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


LINES = [line.split("#")[0].strip() for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()]
INLINE = [code for text in PAGES.values() for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]


def commands(*beginnings: str) -> list[str]:
    """Returns the command lines of the shell blocks with one of these beginnings, each once, without comments."""
    return list(dict.fromkeys(line for line in LINES if line.startswith(beginnings)))


def composed_settings(text: str) -> list[str]:
    """The overrides of a command line."""
    return [word for word in shlex.split(text) if re.match(r"[~+]?[\w/@.]+=", word)]


def points(overrides: list[str]) -> list[list[str]]:
    """The first and the last point of a sweep, or the one run."""
    if overrides[:1] != ["-m"]:
        return [overrides]
    split = [override.split("=") for override in overrides[1:]]
    return [[f"{name}={values.split(',')[end]}" for name, values in split] for end in (0, -1)]


@pytest.fixture
def triplets(tmp_path: Path) -> Path:
    return write_triplets(tmp_path / "triplets.jsonl", 80)  # for a batch of 64, and some held out


@pytest.fixture
def documented(tmp_path: Path) -> str:
    """The search path of the experiment and the reward that the pages have as examples."""
    for group, name, (text,) in (
        ("experiment", "mine", [b for b in blocks("yaml", "algorithms.md") if "@package" in b]),
        ("reward", "margin", blocks("yaml", "CONTRIBUTING.md")),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    return f"hydra.searchpath=[file://{tmp_path}]"


def test_every_command_is_of_a_tested_kind():
    tested = ("python train.py", "python evaluate.py", "python -m ", "make ", "torchrun ", "sbatch ", "pip install ", "pre-commit install")
    assert [line for line in LINES if line and not line.startswith(tested)] == []


@pytest.mark.parametrize("command", commands("python train.py"))
def test_train_commands(command, compose, triplets, tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("".join(f"Sentence number {i} is about graphs.\n" for i in range(80)))
    for overrides in points(shlex.split(command)[2:] or ["seed=0"]):
        data = sentences if any("unsup" in override or "wiki1m" in override for override in overrides) else triplets
        own = [re.sub(r"^datamodule\.path=.*", f"datamodule.path={data}", override) for override in overrides]
        if not any(override.startswith(("experiment=", "hparams_search=")) for override in own):
            own.append("experiment=smollm2_sup")  # the default, with the tiny policy in its place
        small = [override for override in SMALL if override.split("=")[0] not in {o.split("=")[0] for o in own}]
        if any(override.startswith(("debug=", "callbacks.")) for override in own):  # settings of callbacks that `minimal` leaves out
            assert compose(*own) is not None  # they are run by tests/test_train.py and tests/callbacks
            continue
        metric = "reward/total/mean"
        if "baseline" in own[0]:
            small, metric = [override for override in small if not override.startswith(ONLY_GRACE)], "update/loss"
            if "tiny" not in own[0] and "smollm2" not in own[0]:  # of docstrings a batch is groups of them
                small.append("datamodule.batch_size=8")
        cfg = compose(*own, *small)
        cfg.packages.train = ["urllib3"]
        cfg.optimized_metric = metric
        if str(cfg.datamodule.get("path")).startswith("hf://"):  # the hub is out of reach
            cfg.datamodule.path = str(data)
        if cfg.ckpt_path == "last":  # and there is a run: tests/test_train.py
            with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
                train(cfg)
            continue
        assert (train(cfg) is None) == cfg.dry_run


@pytest.mark.parametrize("command", commands("torchrun", "sbatch") + [code for code in INLINE if code.startswith("python train.py ")])
def test_other_ways_to_train_compose(command, compose, documented):
    assert compose(documented, *composed_settings(command)).name


def test_evaluate_commands(compose):
    lines = commands("python evaluate.py")
    assert "python evaluate.py" in lines  # run by tests/test_evaluate.py on small tasks
    for command in (*lines, *(code for code in INLINE if code.startswith("python evaluate.py ") and "<" not in code)):
        cfg = compose(*shlex.split(command)[2:], config_name="evaluate")
        if cfg.model is not None:  # neither a checkpoint of yours nor the hub is here: one line says so
            with pytest.raises(SystemExit, match=r"^evaluate.py: no "):
                evaluate.evaluate(cfg)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", "\n".join(PAGES.values())))))
def test_modules_that_are_run_exist(module):
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("command", [line for line in commands("python -m ") if "=" not in line])
def test_modules_that_are_run_have_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(command.split()[2], run_name="__main__")
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("path", re.findall(r"^\| `[\w.]+` \| `((?:src|experiments)\.[\w.]+)` \|$", CHANGELOG, flags=re.MULTILINE))
def test_import_paths_of_the_changelog(path):
    module, name = path.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), name)


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"pip install -e '\.\[(\w+)\]'", "\n".join(PAGES.values()))
    assert named
    assert set(named) <= set(extras)


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command):
    done = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def keys(settings: object, prefix: str = "") -> set[str]:
    """The dotted names of nested settings."""
    if not isinstance(settings, dict):
        return set()
    return {f"{prefix}{name}" for name in settings}.union(*(keys(value, f"{prefix}{name}.") for name, value in settings.items()))


def test_settings_that_are_named_exist(compose):
    composed = [
        compose(*o)
        for o in (
            ["experiment=smollm2_sup"],
            ["experiment=tiny_sup", "reward=document", "rollout=vllm"],
            ["experiment=triplets_sup", "trainer=fsdp"],
            ["experiment=triplets_sup", "datamodule=wiki1m"],
        )
    ]
    known = set().union(*(keys(OmegaConf.to_container(cfg)) for cfg in (*composed, hydra_compose("evaluate"))))
    named = {match[1] for code in INLINE if (match := re.match(r"(\w+(?:\.\w+)+)(=.*)?$", code)) and match[1].split(".")[0] in SETTINGS}
    assert len(named) > 30
    assert sorted(named - known) == []


def test_documented_experiment_composes(compose, documented):
    cfg = compose(documented, "experiment=mine", "datamodule.path=triplets.jsonl")
    assert (cfg.name, cfg.module.num_generations, cfg.rollout.max_new_tokens) == ("mine", 4, 512)
    assert cfg.policy.lora is not None


def test_documented_reward_is_one(monkeypatch):
    names = {}
    for block in blocks("python", "CONTRIBUTING.md"):
        exec(block, names)
    names["test_margin_is_the_equation"]()
    monkeypatch.setattr(rewards, "margin", names["margin"], raising=False)
    (config,) = blocks("yaml", "CONTRIBUTING.md")
    e = rewards.Embeddings.normalised(torch.randn(3, 5), torch.randn(3, 2, 5), torch.randn(3, 1, 5))
    assert instantiate(OmegaConf.create(config))(e).total.shape == (3, 2)


def test_documented_task_is_one(tmp_path):
    (description,) = blocks("yaml", "evaluation.md")
    (tmp_path / "Tickets.yaml").write_text(description)
    (tmp_path / "tickets.tsv").write_text("4.5\tit crashes\tit stops at once\n0.5\tit crashes\tthe colour is wrong\n")
    (task,) = named_tasks(["Tickets"], tmp_path)
    task.load_data()
    assert task.dataset["test"]["score"] == [4.5, 0.5]


def test_python_examples(tiny_policy_folder, tmp_path):
    folder = export(Policy.load(str(tiny_policy_folder)), EncoderSettings.load(tiny_policy_folder), tmp_path / "export")
    ours, theirs = {}, {}
    for names, block in zip((ours, theirs), blocks("python", "README.md"), strict=True):
        exec(block.replace("outputs/smollm2_sup/.../export", str(folder)), names)
    for name in ("plain", "vectors"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    assert len(ours["rationales"]) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        headings = [] if not anchor else re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
