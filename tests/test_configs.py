"""Every config composes, and what it describes can be instantiated."""

import shlex
from pathlib import Path

import lightning as L
import pytest
from hydra import compose as hydra_compose
from hydra.utils import instantiate
from omegaconf import OmegaConf

from src.modules.policy.packaged import SMOLLM2
from src.utils.trainer import instantiate_all
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


EXPERIMENTS = options("experiment")
GROUPS = ("reward", "algorithm", "module", "rollout", "callbacks", "debug", "policy", "policy/lora", "datamodule", "trainer", "logger")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_one_file(experiment):
    file = CONFIGS / "experiment" / f"{experiment}.yaml"
    assert len(file.read_text().splitlines()) <= 35
    cfg = OmegaConf.load(file)
    named = {key: option for choice in cfg.defaults for key, option in choice.items()}
    named.pop("override /policy/lora", None)  # its own choice, as in the example of docs/algorithms.md
    assert list(named) == [f"override /{group}" for group in ("datamodule", "policy", "module", "reward", "algorithm", "callbacks")]
    assert cfg.name == experiment


@pytest.mark.parametrize("group", ["experiment", "algorithm", "module", "hparams_search", "reward", "rollout"])
def test_no_fragment_is_selectable(group):
    assert {file.suffix for file in (CONFIGS / group).iterdir()} == {".yaml"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_instantiates(experiment, compose):
    cfg = compose(f"experiment={experiment}", "trainer.accelerator=cpu")
    if OmegaConf.is_missing(cfg.datamodule, "path"):
        cfg.datamodule.path = "triplets.jsonl"  # the user's own; nothing is read before training
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert Path(cfg.policy.path).is_dir()  # the fixture's
    cfg.packages.train = ["torchmetrics"]  # all of them take a minute to read
    assert isinstance(instantiate(cfg.datamodule), L.LightningDataModule)
    assert isinstance(instantiate(cfg.module), L.LightningModule)
    callbacks = instantiate_all(cfg.callbacks, "callbacks")
    assert all(isinstance(callback, L.Callback) for callback in callbacks)
    assert isinstance(instantiate(cfg.trainer, callbacks=callbacks, logger=False), L.Trainer)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in options(group)])
def test_option_composes(group, name, compose):
    compose("experiment=tiny_sup", f"{group}={name}")


@pytest.mark.parametrize("base", ["document", "listwise"])
def test_novelty_stands_on_another_reward(base, compose):
    cfg = compose("experiment=tiny_sup", "reward=novelty", *([] if base == "document" else [f"reward@reward.reward={base}"]))
    assert instantiate(cfg.reward).reward.func.__name__ == base


@pytest.mark.parametrize("rollout", options("rollout"))
def test_rollout_composes_for_evaluation(rollout, compose):
    cfg = compose(f"rollout@engine={rollout}", config_name="evaluate")
    assert cfg.engine._partial_
    assert OmegaConf.to_container(cfg.engine, resolve=True, throw_on_missing=True)


def test_vllm_takes_the_prompt_length(compose):
    assert compose("rollout=vllm").rollout.max_prompt_tokens == compose().module.max_prompt_tokens


def test_train_names_what_it_runs(compose):
    default, without = (hydra_compose("train", overrides, return_hydra_config=True) for overrides in ([], ["~experiment", "name=none"]))
    assert default.hydra.runtime.choices == {**without.hydra.runtime.choices, "experiment": "smollm2_sup"}
    assert (default.name, default.policy.path) == ("smollm2_sup", SMOLLM2)


def test_help(programs, compose):
    done = programs.run("train.py", "--help")
    assert done.returncode == 0, done.stderr
    (experiments,) = [line for line in done.stdout.splitlines() if line.startswith("experiment: ")]
    assert experiments.removeprefix("experiment: ").split(", ") == EXPERIMENTS
    assert "\nreward: document, listwise, novelty, paper, plackett_luce, unsupervised\n" in done.stdout
    settings = [line.split("=")[0].strip() for line in done.stdout.split("(name=value):\n")[1].split("\n\n")[0].splitlines()]
    assert len(settings) == 5
    for name in settings:
        parent, _, key = name.rpartition(".")
        assert key in OmegaConf.select(compose("datamodule=wiki1m"), parent), name


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("smollm2")])
def test_smollm2_experiments_are_of_one_size(experiment, gpu, compose, monkeypatch):
    monkeypatch.setattr("src.utils.machine.has_gpu", lambda: gpu)
    cfg = hydra_compose("train", overrides=[f"experiment={experiment}"])
    data = cfg.datamodule
    assert cfg.trainer.limit_train_batches == (150 if gpu else 7)
    assert (data.get("batch_size") or data.modules_per_batch * data.docstrings_per_module) == (48 if gpu else 16)
    assert cfg.module.instruction == "Explain in a few words what this text is about."
    assert (cfg.module.max_prompt_tokens, cfg.rollout.max_new_tokens) == ((160, 48) if gpu else (96, 16))
    assert cfg.module.get("pathwise_weight", 0.0) == (0.0 if any(word in experiment for word in ("paper", "baseline", "distill")) else 1.0)


def test_debug_fast_wins_over_the_experiment(compose):
    cfg = compose("debug=fast")
    assert cfg.trainer.limit_train_batches == 2
    assert cfg.callbacks.final_report.tasks.docstrings.size.documents == 60


def test_callbacks_can_be_switched_off(compose):
    cfg = compose("callbacks.mteb=null", "callbacks.final_report=null")
    names = [type(callback).__name__ for callback in instantiate_all(cfg.callbacks, "callbacks")]
    assert "MTEBEvaluation" not in names
    assert "MetricsMonitor" in names


@pytest.mark.parametrize("search", options("hparams_search"))
def test_search_composes(search, compose):
    cfg = compose(f"hparams_search={search}")
    assert (cfg.name, cfg.optimized_metric) == (search, "mteb/average")


def study_commands(start: str) -> list[list[str]]:
    """Returns the arguments of the studies' commands that begin with `start`."""
    lines = [line for file in (ROOT / "experiments").glob("*/README.md") for line in file.read_text().splitlines()]
    return [shlex.split(line, comments=True)[len(start.split()) - 1 :] for line in lines if line.startswith(start)]


STUDIES = study_commands("python train.py hparams_search=")


@pytest.mark.parametrize("overrides", STUDIES, ids=" ".join)
def test_study_command_composes(overrides, compose):
    cfg = compose(*(override for override in overrides if "," not in override))
    assert overrides[0] == f"hparams_search={cfg.name}"


def test_study_reports_name_their_sweeps():
    reports = [arguments[1] for arguments in study_commands("python -m experiments.sweep_report")]
    assert len(reports) == len(STUDIES) > 0
    assert all(any(report in " ".join(overrides) for overrides in STUDIES) for report in reports)


@pytest.mark.parametrize("algorithm", options("algorithm"))
def test_tiny_sup_leaves_algorithms_alone(algorithm, compose):
    chosen, plain = (compose(start, "name=none", f"algorithm={algorithm}").algorithm for start in ("experiment=tiny_sup", "~experiment"))
    assert OmegaConf.to_container(chosen) == OmegaConf.to_container(plain)
    assert instantiate(chosen)


def test_algorithms_have_the_same_settings(compose):
    assert len({tuple(sorted(compose(f"algorithm={name}").algorithm)) for name in options("algorithm")}) == 1


def test_no_package_is_in_two_lists(compose):
    lists = compose().packages
    named = [package for packages in lists.values() for package in packages]
    assert len(named) == len(set(named))
    assert set(lists) == {"cold_start", "train", "validation", "test"}
