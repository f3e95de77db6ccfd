"""Metrics of every batch: rewards or similarities, the update, speed and memory."""

import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.callbacks.monitoring import MonitoringCallback, is_due, last_report, log_values, save_figure
from src.modules.grace import GRACE
from src.modules.objectives.algorithm import Algorithm
from src.modules.policy_module import PolicyModule
from src.modules.training.metrics import BatchMetrics, ContrastiveMetrics, GRACEMetrics
from src.utils.plots import TermHistory, reward_terms_figure

log = logging.getLogger(__name__)

_NO_SPREAD = 1e-6  # rounding of float32 similarities, well below any difference between two rationales


class MetricsMonitor(MonitoringCallback[PolicyModule]):
    """Logs `batch_metrics` after every batch (every `trainer.log_every_n_steps`); draws GRACE's reward terms at the end.

    Place it before callbacks that evaluate, whose time is then not part of seconds/batch.

    A group baseline removes what is the same for all rollouts of an instance, so a weighted reward term without spread within
    groups cannot move the gradient: it is warned about, once.

    Args:
        figure_path: file of the figure (PNG), besides MLflow; None draws none.
    """

    def __init__(self, figure_path: str | None = None) -> None:
        self.figure_path = Path(figure_path) if figure_path else None
        self.history: dict[str, TermHistory] = {}
        self.weights: dict[str, float] = {}
        self._warned: set[str] = set()
        self._needs_spread = False
        self._began = 0.0

    @property
    def state_key(self) -> str:
        return "RewardDiagnostics"  # its name in earlier checkpoints

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        self._needs_spread = isinstance(module, GRACE) and needs_spread(module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._began = time.perf_counter()

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        report = last_report(module)
        memory = peak_memory(module.device)
        metrics = batch_metrics(report) | dict(zip(memory, module.ranks.largest(*memory.values()), strict=True))
        metrics |= {"seconds/batch": time.perf_counter() - self._began, "epoch": float(trainer.current_epoch)}
        if isinstance(report, GRACEMetrics):
            self._remember(report, metrics, module.rollout_batches)
            self._warn(report, metrics)
        log_values(trainer, metrics, module.rollout_batches, send=is_due(module, trainer.log_every_n_steps))  # type: ignore[attr-defined]

    def _remember(self, report: GRACEMetrics, metrics: dict[str, float], step: int) -> None:
        self.weights = dict(report.reward.weights)
        for name in [*report.reward.terms, "total"]:
            term = self.history.setdefault(name, TermHistory())
            term.steps.append(step)
            term.mean.append(metrics.get(f"reward/{name}/mean", math.nan))
            term.within_group_std.append(metrics.get(f"reward/{name}/within_group_std", math.nan))

    def _warn(self, report: GRACEMetrics, metrics: dict[str, float]) -> None:
        for name, weight in report.reward.weights.items() if self._needs_spread else ():
            if weight and name not in self._warned and metrics.get(f"reward/{name}/within_group_std", math.inf) < _NO_SPREAD:
                self._warned.add(name)
                log.warning(
                    "reward term %r (weight %g) is the same for all rollouts of an instance (std within groups below %g): it cannot move "
                    "the gradient, as the group baseline removes it (with algorithm.gae_lambda: among rationales of one length); "
                    "reward=document and reward=listwise have forms of it that depend on the rollout",
                    *(name, weight, _NO_SPREAD),
                )

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.figure_path is not None and self.history and trainer.is_global_zero:
            save_figure(trainer, reward_terms_figure(self.history, self.weights), self.figure_path)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: vars(term) for name, term in self.history.items()}, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {name: TermHistory(**term) for name, term in state_dict["history"].items()}
        self._warned = set(state_dict["warned"])


def batch_metrics(report: BatchMetrics) -> dict[str, float]:
    """Returns the metrics of a batch by the names under which they are logged; undefined ones (nan) are left out."""
    metrics = {f"update/{name}": float(value) for name, value in report.update.items()}
    metrics |= {f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
    for phase, tokens in (("rollout", report.rollout_tokens), ("update", report.update_tokens)):
        if report.seconds.get(phase):
            metrics[f"throughput/{phase}_tokens_per_second"] = tokens / report.seconds[phase]
    if isinstance(report, ContrastiveMetrics):
        names = ("accuracy", "positive_similarity", "unrelated_similarity", "false_negatives")
        metrics |= {f"contrastive/{name}": float(getattr(report, name)) for name in names}
    if isinstance(report, GRACEMetrics):
        others = {f"of_{role}": values for role, values in report.other_rewards.items()}
        for name, values in {**report.reward.terms, "total": report.reward.total, **others}.items():
            metrics[f"reward/{name}/mean"] = float(values.mean())
            metrics[f"reward/{name}/within_group_std"] = within_group_std(values)
        metrics |= {
            "rollout/truncated_fraction": 1.0 - float(report.finished.float().mean()),
            "rollout/rationale_length": float(report.rationale_lengths.float().mean()),
            "rollout/distinct_rationales": report.distinct_rationales,
            "rollout/unrelated_similarity": report.unrelated_similarity,
            "rollout/false_negatives": float(report.false_negatives),
            "rollout/logprob_mismatch_mean": report.logprob_mismatch[0],
            "rollout/logprob_mismatch_max": report.logprob_mismatch[1],
            "advantage/std": float(report.advantages.std(correction=0)),
        }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def within_group_std(values: Tensor) -> float:
    """Returns the mean over groups of the population standard deviation of [B, K] values over K; 0 where K = 1."""
    return float(values.float().std(dim=1, correction=0).mean())


def peak_memory(device: torch.device) -> dict[str, float]:
    """Returns the peak memory in GiB: resident memory of this process and, on a GPU, what torch allocated there."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    memory = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        memory["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory


def needs_spread(module: GRACE) -> bool:
    """Returns whether a reward term that is the same for all rollouts of an instance cannot move the gradient.

    It can through the pathwise term, which has no baseline, and where rollouts of queries or negatives are trained on.
    """
    pathwise = module.hparams["pathwise_weight"] > 0 and module.pathwise_reward is None
    return _has_group_baseline(module.algorithm) and not module.hparams["also_learn_from"] and not pathwise


def _has_group_baseline(algorithm: Algorithm) -> bool:
    """Returns whether advantages stay the same when all rewards of a group, that of a greedy rollout too, are raised by one number."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    keep = torch.ones_like(rewards, dtype=torch.bool)
    raised = rewards + torch.tensor([[0.0], [5.0]])
    plain, other = (algorithm.advantage(r, keep, *([r[:, 0]] if algorithm.greedy_baseline else [])) for r in (rewards, raised))
    return torch.allclose(plain, other)
