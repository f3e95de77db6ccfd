"""MTEB tasks during training."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from src.callbacks.monitoring import MonitoringCallback, is_due, undisturbed
from src.evaluation.run_tasks import EvaluationScores, EvaluationStoppedError, run_tasks
from src.modules.encoder.settings import RationaleFor
from src.modules.policy_module import PolicyModule
from src.utils.preemption import stop_requested
from src.utils.tracking import log_metrics, log_tasks

log = logging.getLogger(__name__)


class MTEBEvaluation(MonitoringCallback[PolicyModule]):
    """Scores the policy on MTEB tasks at the start, every n rollout batches and at the end.

    Logs mteb/<task>, mteb/category/<category>, mteb/average (fractions) and mteb/seconds. `trainer.callback_metrics` holds the average
    for checkpoints and sweeps, and mteb/rollout_batches, the batch at which it was measured.

    Args:
        tasks: makes the tasks; called once, when training starts.
        every_n_rollout_batches: how often; 0 for the start and the end only, None for never.
        rationale, temperature: of the encoder (both, query, document or none); rationale None: as the policy is trained.
        embeddings_dir: where embeddings of the starting policy are kept; see `starting_embeddings`.
        embeddings_gib: most that they may take there.
    """

    def __init__(
        self,
        tasks: Callable[[], list[Any]],
        every_n_rollout_batches: int | None = 20,
        rationale: RationaleFor | bool | None = None,
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
        log_tasks(trainer, self._tasks)
        if self._scored_at >= 0:
            self._publish(trainer)  # the last score of the run that is resumed
            if self._scored_at != module.rollout_batches:
                self.after_batch(trainer, module)  # the signal that stopped it came in an evaluation
        elif failures := self.evaluate(trainer, module).failures:
            # a task that fails now would always fail, and the average be that of other tasks
            raise RuntimeError(f"MTEB tasks fail: {named(failures)}; take them out of callbacks.mteb.tasks or provide what is missing")

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if is_due(module, self.every or 0):
            self.evaluate(trainer, module)

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.every is not None and self._scored_at != module.rollout_batches:
            self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: PolicyModule) -> EvaluationScores:
        """Runs and logs the tasks; without an average where a task failed, which is warned about."""
        step, began = module.rollout_batches, time.perf_counter()
        kept = starting_embeddings(module, self.embeddings_dir)
        options = {"rationale": self.rationale, "temperature": self.temperature}
        scores = score_policy(trainer, module, self._tasks, f"training-step{step}", options, None, kept, self.embeddings_gib)
        metrics = {f"mteb/{task}": score for task, score in scores.tasks.items()}
        metrics |= {f"mteb/category/{category}": score for category, score in scores.categories.items()}
        self._scored_at, self._average = step, math.nan if scores.failures else scores.average
        if scores.failures:
            log.warning("MTEB tasks failed at batch %d, no average: %s", step, named(scores.failures))
        else:
            metrics["mteb/average"] = scores.average
        log_metrics(trainer, metrics | {"mteb/seconds": time.perf_counter() - began}, step)
        self._publish(trainer)
        return scores

    def _publish(self, trainer: L.Trainer) -> None:
        if not math.isnan(self._average):
            values = {"mteb/average": self._average, "mteb/rollout_batches": self._scored_at}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"scored_at": self._scored_at, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scored_at, self._average = state_dict["scored_at"], state_dict["average"]


def score_policy(
    trainer: L.Trainer,
    module: PolicyModule,
    tasks: list[Any],
    name: str,
    encoder: dict[str, Any],
    results_dir: Path | None,
    embeddings_dir: Path | None,
    embeddings_gib: float,
) -> EvaluationScores:
    """Scores the current policy in the trainer's precision, its texts shared over the ranks; all of them return the scores.

    Args:
        encoder: arguments of `PolicyModule.encoder`.
        name, results_dir, embeddings_dir, embeddings_gib: see `run_tasks`.

    Raises:
        SIGTERMException: a signal asked the run to stop; the evaluation is done again after the run is resumed.
    """
    kept = (results_dir, name, embeddings_dir, embeddings_gib)
    with undisturbed(module):
        own = module.encoder(**encoder, bf16=trainer.precision == "bf16-mixed")
        try:
            return run_tasks(own, tasks, *kept, also_without=True, ranks=module.ranks, stop=lambda: stop_requested(trainer))
        except EvaluationStoppedError as error:
            raise SIGTERMException from error


def starting_embeddings(module: PolicyModule, folder: str | None) -> Path | None:
    """Returns `folder` for embeddings of the starting policy, which other runs (a sweep's, other seeds', evaluate.py) find there.

    None for those of a trained policy, which no other run needs.
    """
    return Path(folder) if folder and module.rollout_batches == 0 else None


def named(failures: dict[str, str]) -> str:
    """Returns tasks and reasons as one line."""
    return "; ".join(f"{task}: {reason}" for task, reason in failures.items())
