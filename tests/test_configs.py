"""Every config composes, what it describes can be made, and mistakes are told in Hydra's own words."""

import shlex
from pathlib import Path

import lightning as L
import pytest
from hydra import compose as hydra_compose
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from src.modules.policy.packaged import SMOLLM2
from src.utils.instantiate import instantiate_all
from tests.conftest import ROOT, Compose


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / group).glob("*.yaml"))


def needs_hub(cfg: DictConfig) -> bool:
    """Whether the policy is a name on the hub; the compose fixture points local folders to the tiny policy."""
    path = cfg.get("policy", {}).get("path")
    return path is not None and not Path(path).is_dir()


def test_there_are_experiments() -> None:
    assert "tiny_sup" in options("experiment")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_composes_and_instantiates(experiment: str, compose: Compose) -> None:
    cfg = compose(f"experiment={experiment}", "trainer.accelerator=cpu")
    if OmegaConf.is_missing(cfg.datamodule, "path"):
        cfg.datamodule.path = "triplets.jsonl"  # the user's own; nothing is read before training
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if needs_hub(cfg):
        pytest.skip(f"{experiment} takes its policy from the hub")
    cfg.packages.cold_start = cfg.packages.train = ["torchmetrics"]  # all of them take a minute to read
    assert isinstance(instantiate(cfg.datamodule), L.LightningDataModule)
    assert isinstance(instantiate(cfg.module), L.LightningModule)
    callbacks = instantiate_all(cfg.callbacks, "callbacks")
    assert all(isinstance(callback, L.Callback) for callback in callbacks)
    assert isinstance(instantiate(cfg.trainer, callbacks=callbacks, logger=False), L.Trainer)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in ("reward", "algorithm", "rollout", "callbacks", "debug", "policy", "policy/lora", "datamodule", "trainer", "logger")
        for name in options(group)
    ],
)
def test_every_option_composes_with_the_default(group: str, name: str, compose: Compose) -> None:
    experiment = "cold_start" if name in ("cold_start", "demonstrations", "tiny_fresh") else "tiny_sup"
    assert compose(f"experiment={experiment}", f"{group}={name}") is not None


@pytest.mark.parametrize("rollout", options("rollout"))
def test_every_rollout_engine_composes_for_evaluation(rollout: str, compose: Compose) -> None:
    cfg = compose(f"rollout@engine={rollout}", config_name="evaluate")
    assert cfg.engine._partial_
    assert OmegaConf.to_container(cfg.engine, resolve=True, throw_on_missing=True)


def test_the_longest_prompt_of_training_is_what_vllm_is_set_up_for(compose: Compose) -> None:
    assert compose("rollout=vllm").rollout.max_prompt_tokens == compose().module.max_prompt_tokens


def test_the_default_needs_no_setting(compose: Compose) -> None:
    cfg = hydra_compose("train")
    assert (cfg.name, cfg.policy.path) == ("smollm2_sup", SMOLLM2)


SMOLLM2_EXPERIMENTS = [name for name in options("experiment") if name.startswith("smollm2")]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("experiment", SMOLLM2_EXPERIMENTS)
def test_smollm2_experiments_are_of_one_size(experiment: str, gpu: bool, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.utils.machine.has_gpu", lambda: gpu)
    cfg, default = (hydra_compose("train", overrides=[f"experiment={name}"]) for name in (experiment, "smollm2_sup"))
    sizes = [
        (
            c.trainer.limit_train_batches,
            c.datamodule.get("batch_size") or c.datamodule.modules_per_batch * c.datamodule.docstrings_per_module,
        )
        for c in (cfg, default)
    ]
    assert sizes[0] == sizes[1] == ((150, 48) if gpu else (7, 16))
    assert (cfg.module.instruction, cfg.rollout.max_new_tokens) == (default.module.instruction, default.rollout.max_new_tokens)
    assert cfg.module.get("pathwise_weight", 0.0) == (0.0 if "paper" in experiment or "baseline" in experiment else 1.0)


def test_debug_fast_wins_over_the_experiment(compose: Compose) -> None:
    cfg = compose("debug=fast")
    assert cfg.trainer.limit_train_batches == 2
    assert cfg.callbacks.final_report.tasks.docstrings.size.documents == 60


def test_callbacks_can_be_switched_off(compose: Compose) -> None:
    cfg = compose("callbacks.mteb=null", "callbacks.final_report=null")
    names = [type(callback).__name__ for callback in instantiate_all(cfg.callbacks, "callbacks")]
    assert "MTEBEvaluation" not in names
    assert "MetricsMonitor" in names


@pytest.mark.parametrize("search", options("hparams_search"))
def test_search_composes(search: str, compose: Compose) -> None:
    cfg = compose(f"hparams_search={search}")
    assert cfg.optimized_metric == "mteb/average"
    assert cfg.name == search


def study_commands(start: str) -> list[list[str]]:
    """What follows the program's name in the studies' commands that begin so."""
    lines = [line for file in (ROOT / "experiments").glob("*/README.md") for line in file.read_text().splitlines()]
    return [shlex.split(line, comments=True)[len(start.split()) - 1 :] for line in lines if line.startswith(start)]


STUDIES = study_commands("python train.py hparams_search=")


@pytest.mark.parametrize("overrides", STUDIES, ids=" ".join)
def test_commands_of_studies_compose(overrides: list[str], compose: Compose) -> None:
    cfg = compose(*(override for override in overrides if "," not in override))
    assert overrides[0] == f"hparams_search={cfg.name}"


def test_reports_of_studies_are_of_sweeps_that_their_commands_make() -> None:
    reports = [arguments[1] for arguments in study_commands("python -m experiments.sweep_report")]
    assert len(reports) == len(STUDIES) > 0
    assert all(any(report in " ".join(overrides) for overrides in STUDIES) for report in reports)


@pytest.mark.parametrize("algorithm", options("algorithm"))
def test_every_algorithm_is_its_own_under_the_default_experiment(algorithm: str, compose: Compose) -> None:
    chosen, plain = (
        compose(experiment, "name=none", f"algorithm={algorithm}").algorithm for experiment in ("experiment=tiny_sup", "~experiment")
    )
    assert OmegaConf.to_container(chosen) == OmegaConf.to_container(plain)
    assert instantiate(chosen)


def test_an_unknown_key_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'module\.lerning_rate'"):
        compose("module.lerning_rate=1")


def test_a_misspelt_group_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'rewards'"):
        compose("rewards=paper")


def test_a_misspelt_option_is_refused_and_the_options_are_listed(compose: Compose) -> None:
    with pytest.raises(MissingConfigException, match=r"(?s)reward/papr.*document.*listwise.*paper"):
        compose("reward=papr")


def test_no_package_serves_twice(compose: Compose) -> None:
    lists = compose().packages
    named = [package for packages in lists.values() for package in packages]
    assert len(named) == len(set(named))
    assert set(lists) == {"cold_start", "train", "validation", "test"}
