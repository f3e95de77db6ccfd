"""MTEB tasks while training runs."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback
from src.callbacks.probe import in_training_arithmetic, is_due, start_embeddings, undisturbed
from src.evaluation.run_tasks import EvaluationScores, run_tasks
from src.modules.policy_module import PolicyModule
from src.utils.tracking import log_metrics

log = logging.getLogger(__name__)


class MTEBEvaluation(MonitoringCallback):
    """Scores the policy on MTEB tasks at the start, every n rollout batches and at the end.

    Logs mteb/<task>, mteb/category/<category> and mteb/average (fractions), and mteb/seconds. The average also stands in
    `trainer.callback_metrics`, where checkpoints and sweeps find it, beside mteb/rollout_batches, when it was measured.

    Args:
        tasks: makes the tasks; called once, when training starts (mteb takes seconds to import).
        every_n_rollout_batches: how often; 0 for the start and the end only, None for never.
        rationale, temperature: how texts are encoded; None: with rationales if the policy is trained with them.
        embeddings_dir: where embeddings of the starting policy are kept, for other runs that begin with it (the points of a sweep, other
            seeds, evaluate.py); None: nowhere. See `start_embeddings`.
        embeddings_gib: most that they may take there.
    """

    def __init__(
        self,
        tasks: Callable[[], list[Any]],
        every_n_rollout_batches: int | None = 20,
        rationale: bool | None = None,
        temperature: float = 0.0,
        embeddings_dir: str | None = None,
        embeddings_gib: float = 50.0,
    ) -> None:
        self.make_tasks, self.every = tasks, every_n_rollout_batches
        self.rationale, self.temperature = rationale, temperature
        self.embeddings_dir, self.embeddings_gib = embeddings_dir, embeddings_gib
        self._tasks: list[Any] = []
        self._scored_at, self._average = -1, math.nan

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.every is None:
            return
        with undisturbed(module):
            self._tasks = self.make_tasks()
        if self._scored_at >= 0:
            self._tell(trainer)  # resumed: what the run that was stopped has scored last
            return
        scores = self.evaluate(trainer, module)
        if scores.failures:
            # What fails on the first try would fail every time, and the average would be one of other tasks.
            raise RuntimeError(f"MTEB tasks fail: {_failures(scores)}; take them out of callbacks.mteb.tasks or provide what is missing")

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if is_due(module, self.every or 0):
            self.evaluate(trainer, module)

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.every is not None and self._scored_at != module.rollout_batches:
            self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: PolicyModule) -> EvaluationScores:
        """Runs and logs the tasks. A failed task is warned about and leaves the average out: it would mean something else."""
        step = module.rollout_batches
        began = time.perf_counter()
        with undisturbed(module), in_training_arithmetic(trainer):
            encoder = module.encoder(rationale=self.rationale, temperature=self.temperature)
            kept = start_embeddings(trainer, module, self.embeddings_dir)
            scores = run_tasks(encoder, self._tasks, None, f"training-step{step}", kept, self.embeddings_gib, also_without=True)
        scores = trainer.strategy.broadcast(scores)  # what is decided by them is decided alike everywhere
        metrics = {f"mteb/{task}": score for task, score in scores.tasks.items()}
        metrics |= {f"mteb/category/{category}": score for category, score in scores.categories.items()}
        if scores.failures:
            log.warning("MTEB tasks failed at batch %d, no average: %s", step, _failures(scores))
        else:
            metrics["mteb/average"] = scores.average
        log_metrics(trainer, metrics | {"mteb/seconds": time.perf_counter() - began}, step)
        self._scored_at, self._average = step, metrics.get("mteb/average", math.nan)
        self._tell(trainer)
        return scores

    def _tell(self, trainer: L.Trainer) -> None:
        # Lightning's own `log` is refused at the start and the end of training; this dict is what it would fill
        if not math.isnan(self._average):
            trainer.callback_metrics["mteb/average"] = torch.tensor(self._average)
            trainer.callback_metrics["mteb/rollout_batches"] = torch.tensor(self._scored_at)  # later weights have no score

    def state_dict(self) -> dict[str, Any]:
        return {"scored_at": self._scored_at, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scored_at, self._average = state_dict["scored_at"], state_dict["average"]


def _failures(scores: EvaluationScores) -> str:
    return "; ".join(f"{task}: {error}" for task, error in scores.failures.items())
