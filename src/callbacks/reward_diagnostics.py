"""Which reward terms move the gradient, and what the policy does for them."""

import logging
import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from src.callbacks.monitoring import MonitoringCallback, last_report
from src.modules.grace import GRACE
from src.modules.objectives.algorithm import Algorithm
from src.modules.policy_module import PolicyModule
from src.modules.training.metrics import GRACEMetrics
from src.utils.plots import TermHistory, reward_terms_figure
from src.utils.tracking import log_figure

log = logging.getLogger(__name__)

_NO_SPREAD = 1e-6  # rounding of float32 similarities, well below any difference between two rationales


def within_group_std(values: Tensor) -> float:
    """Mean over groups of the (population) standard deviation of [B, K] values over K; 0 where K = 1."""
    return float(values.float().std(dim=1, correction=0).mean())


def diagnose(report: GRACEMetrics) -> dict[str, float]:
    """The metrics of one rollout batch, by the names under which they are logged; those that are not defined left out."""
    metrics = {}
    for name, values in [*report.reward.terms.items(), ("total", report.reward.total)]:
        metrics[f"reward/{name}/mean"] = float(values.mean())
        metrics[f"reward/{name}/within_group_std"] = within_group_std(values)
    for side, values in report.other_rewards.items():
        metrics[f"reward/of_{side}/mean"] = float(values.mean())
        metrics[f"reward/of_{side}/within_group_std"] = within_group_std(values)
    metrics |= {
        "rollout/truncated_fraction": 1.0 - float(report.finished.float().mean()),
        "rollout/rationale_length": float(report.rationale_lengths.float().mean()),
        "rollout/distinct_rationales": report.distinct_rationales,
        "rollout/unrelated_similarity": report.unrelated_similarity,
        "rollout/logprob_mismatch_mean": report.logprob_mismatch[0],
        "rollout/logprob_mismatch_max": report.logprob_mismatch[1],
        "advantage/std": float(report.advantages.std(correction=0)),
    }
    metrics |= {f"update/{name}": float(value) for name, value in report.update.items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _by_group(algorithm: Algorithm) -> bool:
    """Whether advantages stay as they are when a group's rewards, a greedy rollout's included, are raised by one number."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    raised = rewards + torch.tensor([[0.0], [5.0]])
    keep = torch.ones_like(rewards, dtype=torch.bool)
    plain, other = (algorithm.advantage(r, keep, *([r[:, 0]] if algorithm.greedy_baseline else [])) for r in (rewards, raised))
    return torch.allclose(plain, other)


class RewardDiagnostics(MonitoringCallback):
    """Logs `diagnose(module.report)` after every rollout batch and draws the reward terms over them at the end.

    A group baseline removes whatever is the same for all rollouts of an instance. So a weighted term without spread
    within groups is warned about, once: it shows in the reward and not in the gradient. (Not where another baseline is taken, or
    rollouts of queries and negatives are learned from, which such terms may tell apart.)

    Args:
        figure_path: where the figure goes (PNG), besides MLflow; null draws none.
    """

    def __init__(self, figure_path: str | None = None) -> None:
        self.figure_path = Path(figure_path) if figure_path else None
        self.history: dict[str, TermHistory] = {}
        self.weights: dict[str, float] = {}
        self._warned: set[str] = set()
        self._needs_spread = True

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not isinstance(module, GRACE):
            raise TypeError(f"callbacks.reward_diagnostics: {type(module).__name__} has no rewards to watch; choose callbacks=contrastive")
        # what is one number for a group moves nothing, if its baseline is the group's and its positives alone are learned from; the
        # pathwise term has no baseline
        moved = module.hparams["pathwise_weight"] > 0 and module.pathwise_by_reward
        self._needs_spread = _by_group(module.algorithm) and not module.hparams["also_learn_from"] and not moved

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning would send what an earlier batch had as this one's too, where this one has none: no update, no loss."""
        results = trainer._results
        for key in [key for key, metric in (results or {}).items() if not metric.meta.on_epoch]:
            del results[key]  # type: ignore[union-attr]

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        report = cast(GRACEMetrics, last_report(module))
        metrics = diagnose(report)
        self._remember(report, metrics, module.rollout_batches)
        self._warn(report, metrics)
        # Lightning sends all that is logged in this hook in one call, at the step that is named here. The report is that of
        # all ranks, so there is nothing left to reduce.
        module.log_dict(metrics | {"step": float(module.rollout_batches)}, on_step=True, on_epoch=False)

    def _remember(self, report: GRACEMetrics, metrics: dict[str, float], step: int) -> None:
        self.weights = dict(report.reward.weights)
        for name in [*report.reward.terms, "total"]:
            term = self.history.setdefault(name, TermHistory())
            term.steps.append(step)
            term.mean.append(metrics.get(f"reward/{name}/mean", math.nan))
            term.within_group_std.append(metrics.get(f"reward/{name}/within_group_std", math.nan))

    def _warn(self, report: GRACEMetrics, metrics: dict[str, float]) -> None:
        if not self._needs_spread:
            return
        for name, weight in report.reward.weights.items():
            if weight and name not in self._warned and metrics.get(f"reward/{name}/within_group_std", math.inf) < _NO_SPREAD:
                self._warned.add(name)
                log.warning(
                    "reward term %r (weight %g) is the same for all rollouts of an instance (std within groups below %g): it cannot move "
                    "the gradient, as the group baseline removes it (with algorithm.gae_lambda, among rationales of one length). If it "
                    "stays so, its weight does nothing; reward=document and "
                    "reward=listwise have forms of it that depend on the rollout",
                    name,
                    weight,
                    _NO_SPREAD,
                )

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.figure_path is None or not self.history or not trainer.is_global_zero:
            return
        figure = reward_terms_figure(self.history, self.weights)
        self.figure_path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.figure_path)
        log_figure(trainer, figure, f"figures/{self.figure_path.name}")

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: vars(term) for name, term in self.history.items()}, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {name: TermHistory(**term) for name, term in state_dict["history"].items()}
        self._warned = set(state_dict["warned"])
