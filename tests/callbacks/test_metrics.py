from dataclasses import replace

import lightning as L
import pytest
import torch

from src.callbacks.metrics import MetricsMonitor, batch_metrics, peak_memory, within_group_std
from src.modules.objectives import advantages, rewards
from src.modules.objectives.rewards import Reward
from src.modules.training.metrics import GRACEMetrics
from tests.callbacks.conftest import fit, make_module, steps


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
        update={"loss": -0.5, "grad_norm": 2.0, "updates": 4.0},
        logprob_mismatch=(0.01, 0.04),
        seconds={"rollout": 2.0, "encode": 0.5, "update": 4.0},
        rollout_tokens=100,
        update_tokens=400,
        instance_ids=["a", "b"],
    )


def test_batch_metrics():
    expected = {
        "reward/positive/mean": 3.5,
        "reward/total/within_group_std": 1.0,
        "reward/of_query/mean": 2.0,
        "reward/of_query/within_group_std": 0.5,
        "rollout/truncated_fraction": 0.25,
        "rollout/rationale_length": 4.0,
        "rollout/unrelated_similarity": 0.25,
        "rollout/false_negatives": 0.0,
        "rollout/logprob_mismatch_mean": 0.01,
        "rollout/logprob_mismatch_max": 0.04,
        "update/grad_norm": 2.0,
        "throughput/rollout_tokens_per_second": 50.0,
        "throughput/update_tokens_per_second": 100.0,
        "seconds/encode": 0.5,
    }
    metrics = batch_metrics(report())
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "rollout/unrelated_similarity" not in batch_metrics(report(unrelated_similarity=float("nan")))
    assert within_group_std(torch.ones(4, 1)) == 0.0
    assert 0.01 < peak_memory(torch.device("cpu"))["memory/peak_rss_gib"] < 1000


def test_history_survives_a_checkpoint(module, tmp_path):
    monitor, resumed = MetricsMonitor(), MetricsMonitor()
    fit(module, [monitor], tmp_path, batches=3)
    assert monitor.state_key == "RewardDiagnostics"  # so that earlier checkpoints bring its state
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.history == monitor.history
    assert resumed.history["total"].steps == [1, 2, 3]


def test_no_update_logs_no_loss(module, mlflow_logger, tmp_path):
    module.buffer.min_std, module.buffer.max_extra_batches = 1e9, 100  # no group is worth an update

    class FirstLearns(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            module.buffer.min_std = 0.0 if batch_idx == 0 else 1e9

    fit(module, [MetricsMonitor(), FirstLearns()], tmp_path, batches=3, logger=mlflow_logger)
    assert steps(mlflow_logger, "update/loss") == [1]
    assert steps(mlflow_logger, "reward/total/mean") == [1, 2, 3]


def warned_terms(caplog: pytest.LogCaptureFixture) -> list[object]:
    return [record.args[0] for record in caplog.records if "cannot move the gradient" in record.message]


def test_flat_terms_are_warned_about_once(tiny_policy, tmp_path, caplog):
    fit(make_module(tiny_policy, rewards.paper), [MetricsMonitor()], tmp_path, batches=3)
    assert warned_terms(caplog) == ["negative", "hard"]


def test_moving_terms_are_not_warned_about(tiny_policy, tmp_path, caplog):
    document, of_queries, over_the_batch = (make_module(tiny_policy, form) for form in (rewards.document, rewards.paper, rewards.paper))
    of_queries.hparams["also_learn_from"] = ("query",)
    over_the_batch.algorithm = replace(over_the_batch.algorithm, advantage=advantages.reinforce_pp)
    for module in (document, of_queries, over_the_batch):
        fit(module, [MetricsMonitor()], tmp_path, batches=1)
    assert warned_terms(caplog) == []


def test_unsent_metrics_are_kept_for_checkpoints(module, mlflow_logger, tmp_path):
    seen: list[tuple[float, float]] = []

    class EverySecond(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.log_every_n_steps = 2

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            seen.append((float(trainer.callback_metrics["reward/total/mean"]), float(module.batch_metrics.reward.total.mean())))

    fit(module, [MetricsMonitor(), EverySecond()], tmp_path, batches=3, logger=mlflow_logger)
    assert steps(mlflow_logger, "reward/total/mean") == [2]
    assert len(seen) == 3
    assert all(kept == pytest.approx(now) for kept, now in seen)
