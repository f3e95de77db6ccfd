import logging
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from src.callbacks.reward_diagnostics import RewardDiagnostics, diagnose, within_group_std
from src.callbacks.throughput import Throughput, peak_memory, speeds
from src.modules.grace import GRACE
from src.modules.objectives import advantages, rewards
from src.modules.policy.model import Policy
from src.modules.training.metrics import GRACEMetrics
from src.modules.types import Reward
from src.utils.run_logger import RunLogger
from tests.callbacks.conftest import fit, make_module


def report(unrelated_similarity: float = 0.25) -> GRACEMetrics:
    term = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    return GRACEMetrics(
        reward=Reward({"positive": term}, {"positive": 2.0}, 2 * term),
        other_rewards={"query": torch.tensor([[1.0, 3.0], [2.0, 2.0]])},
        advantages=torch.tensor([[-1.0, 1.0], [0.0, 0.0]]),
        finished=torch.tensor([[True, False], [True, True]]),
        rationale_lengths=torch.tensor([[1, 8], [3, 4]]),
        distinct_rationales=0.75,
        unrelated_similarity=unrelated_similarity,
        update={"loss": -0.5, "grad_norm": 2.0, "clip_fraction": 0.0, "entropy": 3.0, "approx_kl": 0.1, "updates": 4.0},
        logprob_mismatch=(0.01, 0.04),
        seconds={"rollout": 2.0, "encode": 0.5, "update": 4.0},
        rollout_tokens=100,
        update_tokens=400,
        instance_ids=["a", "b"],
    )


def test_within_group_std_is_the_mean_over_groups() -> None:
    assert within_group_std(torch.tensor([[1.0, 3.0], [5.0, 5.0]])) == pytest.approx(0.5)
    assert within_group_std(torch.ones(4, 1)) == 0.0


def test_diagnose() -> None:
    metrics = diagnose(report())
    assert metrics["reward/positive/mean"] == 3.5
    assert metrics["reward/total/within_group_std"] == pytest.approx(1.0)
    assert metrics["reward/of_query/mean"] == 2.0
    assert metrics["reward/of_query/within_group_std"] == pytest.approx(0.5)
    assert metrics["rollout/truncated_fraction"] == 0.25
    assert metrics["rollout/rationale_length"] == 4.0
    assert metrics["update/grad_norm"] == 2.0
    assert (metrics["rollout/logprob_mismatch_mean"], metrics["rollout/logprob_mismatch_max"]) == (0.01, 0.04)
    assert "rollout/unrelated_similarity" in metrics
    assert "rollout/unrelated_similarity" not in diagnose(report(unrelated_similarity=float("nan")))


def test_speeds() -> None:
    metrics = speeds(report())
    assert metrics["throughput/rollout_tokens_per_second"] == 50.0
    assert metrics["throughput/update_tokens_per_second"] == 100.0
    assert metrics["seconds/encode"] == 0.5
    assert 0.01 < peak_memory(torch.device("cpu"))["memory/peak_rss_gib"] < 1000


def test_fit_logs_one_step_a_rollout_batch_and_draws(module: GRACE, mlflow_logger: RunLogger, tmp_path: Path) -> None:
    callbacks = [RewardDiagnostics(str(tmp_path / "out" / "terms.png")), Throughput()]
    fit(module, callbacks, tmp_path, batches=3, logger=mlflow_logger)
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    for name in ("reward/positive/mean", "reward/hard/within_group_std", "update/entropy", "seconds/batch", "rollout/distinct_rationales"):
        assert [metric.step for metric in client.get_metric_history(run_id, name)] == [1, 2, 3], name
    assert (tmp_path / "out" / "terms.png").read_bytes().startswith(b"\x89PNG")
    assert [file.path for file in client.list_artifacts(run_id, "figures")] == ["figures/terms.png"]


def test_a_batch_without_an_update_has_no_loss_not_that_of_the_batch_before(
    module: GRACE, mlflow_logger: RunLogger, tmp_path: Path
) -> None:
    module.buffer.min_std, module.buffer.max_extra_batches = 1e9, 100  # no group is worth an update

    class FirstLearns(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int) -> None:
            module.buffer.min_std = 0.0 if batch_idx == 0 else 1e9

    fit(module, [RewardDiagnostics(), FirstLearns()], tmp_path, batches=3, logger=mlflow_logger)
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    assert [point.step for point in client.get_metric_history(run_id, "update/loss")] == [1]
    assert [point.step for point in client.get_metric_history(run_id, "reward/total/mean")] == [1, 2, 3]


def test_paper_form_is_warned_about_once_a_term(tiny_policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(make_module(tiny_policy, rewards.paper), [RewardDiagnostics()], tmp_path, batches=3)
    warned = [record.args[0] for record in caplog.records if "cannot move the gradient" in record.message]  # type: ignore[index]
    assert warned == ["negative", "hard"]


def test_document_form_is_not(module: GRACE, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(module, [RewardDiagnostics()], tmp_path)
    assert "cannot move the gradient" not in caplog.text


def test_state_survives_a_round_trip(module: GRACE, tmp_path: Path) -> None:
    callback, resumed = RewardDiagnostics(), RewardDiagnostics()
    fit(module, [callback], tmp_path)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.history == callback.history


def test_terms_that_move_something_else_are_not_warned_about(tiny_policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_queries, over_the_batch = make_module(tiny_policy, rewards.paper), make_module(tiny_policy, rewards.paper)
    of_queries.hparams["also_learn_from"] = ("query",)
    over_the_batch.algorithm = replace(over_the_batch.algorithm, advantage=advantages.reinforce_pp)
    with caplog.at_level(logging.WARNING):
        for module in (of_queries, over_the_batch):
            fit(module, [RewardDiagnostics()], tmp_path, batches=1)
    assert "cannot move the gradient" not in caplog.text
