import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger

from src.callbacks.general_abilities import GeneralAbilities
from src.evaluation.abilities import AbilityScore, run_abilities
from src.modules.distributed.fsdp import is_cut, shard
from src.modules.grace import GRACE
from src.modules.policy.model import Policy
from tests.callbacks.conftest import fit
from tests.conftest import ROOT, Compose

pytest.importorskip("lm_eval")


def callback(folder: Path) -> GeneralAbilities:
    return GeneralAbilities(str(folder / "abilities.md"), "offline", ["networkx"], str(ROOT / "data" / "cache"), count=8)


def test_before_and_after_are_logged_with_an_interval(module: GRACE, mlflow_logger: MLFlowLogger, tmp_path: Path) -> None:
    watcher = callback(tmp_path)
    fit(module, [watcher], tmp_path, batches=1, logger=mlflow_logger)
    metrics = mlflow_logger.experiment.get_run(mlflow_logger.run_id).data.metrics
    for task in ("docstring_choice", "docstring_text"):
        low, gain, high = (metrics[f"abilities/{task}/{name}"] for name in ("gain_low", "gain", "gain_high"))
        assert low <= gain <= high
        assert {f"abilities/{task}/before", f"abilities/{task}/after"} <= set(metrics)
        assert task in (tmp_path / "abilities.md").read_text()
    assert "report/abilities.md" in {file.path for file in mlflow_logger.experiment.list_artifacts(mlflow_logger.run_id, "report")}


def test_a_policy_whose_weights_are_cut_is_scored_whole(module: GRACE, tiny_policy_folder: Path, tmp_path: Path) -> None:
    watcher, trainer = callback(tmp_path), SimpleNamespace(loggers=[], is_global_zero=False)
    expected = run_abilities(Policy.load(str(tiny_policy_folder)), **watcher.asked)
    alone = not torch.distributed.is_initialized()  # vLLM, where it was started in this process, leaves a group of one
    if alone:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard(module.policy, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        assert is_cut(module.policy)
        looked_on: Any = trainer
        watcher.at_start(looked_on, module)
        watcher.at_end(looked_on, module)
        assert is_cut(module.policy)
    finally:
        if alone:
            torch.distributed.destroy_process_group()
    assert watcher.before == expected
    assert {task: change.gain for task, change in watcher.changes.items()} == dict.fromkeys(expected, 0.0)


def test_a_resumed_run_compares_with_its_first_start(module: GRACE, tmp_path: Path) -> None:
    first, second = callback(tmp_path), callback(tmp_path)
    first.before = {"docstring_choice": AbilityScore("acc", True, (1.0,) * 8, (1.0,) * 8)}
    first._questions = {name: first.asked[name] for name in ("tasks", "packages", "count")}
    second.load_state_dict(first.state_dict())
    fit(module, [second], tmp_path, batches=1)
    assert second.changes["docstring_choice"].before == 1.0


def test_a_resumed_run_that_asks_other_questions_compares_nothing(module: GRACE, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = callback(tmp_path), callback(tmp_path)
    first.before = {"docstring_choice": AbilityScore("acc", True, (1.0,) * 8, (1.0,) * 8)}
    first._questions = {name: first.asked[name] for name in ("tasks", "packages")} | {"count": 9}
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        fit(module, [second], tmp_path, batches=1)
    assert "asked for by other questions than before the stop" in caplog.text
    assert second.changes == {}


def test_the_config_asks_held_out_packages(compose: Compose) -> None:
    cfg = compose("callbacks=abilities").callbacks
    assert cfg.general_abilities.packages == ["scipy", "pandas", "networkx"]
    assert cfg.mteb is not None
