from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.callbacks.general_abilities import GeneralAbilities
from src.evaluation.abilities import AbilityScore, run_abilities
from src.modules.distributed.fsdp import is_sharded, shard
from src.modules.policy.model import Policy
from tests.callbacks.conftest import artifacts, fit
from tests.conftest import ROOT

pytest.importorskip("lm_eval")


def callback(folder: Path, tasks: str | None = "offline") -> GeneralAbilities:
    return GeneralAbilities(str(folder / "abilities.md"), tasks, ["networkx"], str(ROOT / "data" / "cache"), count=8)


def test_changes_are_logged_with_an_interval(module, mlflow_logger, tmp_path):
    fit(module, [callback(tmp_path)], tmp_path, batches=1, logger=mlflow_logger)
    metrics = mlflow_logger.experiment.get_run(mlflow_logger.run_id).data.metrics
    for task in ("docstring_choice", "docstring_text"):
        low, gain, high = (metrics[f"abilities/{task}/{name}"] for name in ("gain_low", "gain", "gain_high"))
        assert low <= gain <= high
        assert {f"abilities/{task}/before", f"abilities/{task}/after"} <= set(metrics)
        assert task in (tmp_path / "abilities.md").read_text()
    assert artifacts(mlflow_logger, "report") == {"abilities.md"}


def test_sharded_policy_is_scored_in_full(module, tiny_policy_folder, tmp_path):
    abilities, trainer = callback(tmp_path), SimpleNamespace(loggers=[], is_global_zero=False)
    expected = run_abilities(Policy.load(str(tiny_policy_folder)), **abilities.questions, **abilities.options)
    alone = not torch.distributed.is_initialized()  # vLLM, where it was started in this process, leaves a group of one
    if alone:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard(module.policy, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        assert is_sharded(module.policy)
        abilities.at_start(trainer, module)
        abilities.at_end(trainer, module)
        assert is_sharded(module.policy)
    finally:
        if alone:
            torch.distributed.destroy_process_group()
    assert abilities.before == expected
    assert {task: change.gain for task, change in abilities.changes.items()} == dict.fromkeys(expected, 0.0)


@pytest.mark.parametrize("count", [8, 9])
def test_resumed_run_compares_with_its_start(count, module, tmp_path, caplog):
    first, second = callback(tmp_path), callback(tmp_path)
    first.before = {"docstring_choice": AbilityScore("acc", True, (1.0,) * 8, (1.0,) * 8)}
    first._questions = first.questions | {"count": count}
    second.load_state_dict(first.state_dict())
    fit(module, [second], tmp_path, batches=1)
    if count == 8:
        assert second.changes["docstring_choice"].before == 1.0
    else:
        assert "the questions are not those of the start" in caplog.text
        assert second.changes == {}


def test_without_tasks_nothing_is_scored(module, tmp_path):
    abilities = callback(tmp_path, tasks=None)
    fit(module, [abilities], tmp_path, batches=1)
    assert abilities.before == {}
    assert not (tmp_path / "abilities.md").exists()


@pytest.mark.parametrize("settings", [["callbacks=abilities"], ["callbacks=smollm2", "callbacks.abilities.tasks=offline"]])
def test_every_list_can_have_abilities(settings, compose):
    cfg = compose(*settings).callbacks
    assert (cfg.abilities.tasks, cfg.abilities.packages) == ("offline", ["scipy", "pandas", "networkx"])
    assert compose().callbacks.abilities.tasks is None
