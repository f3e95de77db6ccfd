"""General abilities of the policy before and after training."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from src.callbacks.monitoring import MonitoringCallback, undisturbed
from src.evaluation.abilities import AbilityScore, Change, ability_markdown, ability_metrics, ability_table, compare, run_abilities
from src.modules.policy_module import PolicyModule
from src.utils.atomic import write_atomic
from src.utils.tracking import log_metrics, log_text

log = logging.getLogger(__name__)


class GeneralAbilities(MonitoringCallback[PolicyModule]):
    """Scores lm-eval tasks at the start and at the end: logs abilities/<task>/{before,after,gain,gain_low,gain_high} and a table.

    Args:
        path: file of the table (Markdown).
        tasks: `offline`, or names of lm-eval tasks; None: nothing is scored.
        packages, cache_dir, count, batch_size: see `run_abilities`.
        tolerance: see `compare`.
    """

    def __init__(
        self,
        path: str,
        tasks: str | Sequence[str] | None,
        packages: Sequence[str],
        cache_dir: str,
        count: int = 200,
        batch_size: int = 16,
        tolerance: float = 0.02,
    ) -> None:
        self.path, self.tolerance = Path(path), tolerance
        named = tasks if tasks is None or isinstance(tasks, str) else list(tasks)
        self.questions: dict[str, Any] = {"tasks": named, "packages": list(packages), "count": count}
        self.options: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size}
        self.before: dict[str, AbilityScore] = {}
        self.changes: dict[str, Change] = {}
        self._questions: dict[str, Any] | None = None  # that the starting policy was asked

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not self.questions["tasks"]:
            return
        if self._questions is None:  # else a resumed run has the scores of its start
            log.info("scoring the starting policy's general abilities")
            self.before = self._score(module)
        elif self._questions != self.questions:
            log.warning("general abilities: the questions are not those of the start of this run, so nothing is compared")
            self.before = {}
        self._questions = self.questions

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not self.before or not self.questions["tasks"]:
            return
        log.info("scoring the trained policy's general abilities")
        after = self._score(module)
        self.changes = {task: compare(score, after[task], self.tolerance) for task, score in self.before.items()}
        log_metrics(trainer, ability_metrics(self.changes), module.rollout_batches)
        if trainer.is_global_zero:
            Console().print(ability_table(self.changes))
            write_atomic(self.path, ability_markdown(self.changes))
            log_text(trainer, ability_markdown(self.changes), "report/abilities.md")

    def _score(self, module: PolicyModule) -> dict[str, AbilityScore]:
        with undisturbed(module):
            return run_abilities(module.policy, **self.questions, **self.options)

    def state_dict(self) -> dict[str, Any]:
        return {"before": {task: asdict(score) for task, score in self.before.items()}, "questions": self._questions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = {task: AbilityScore(**score) for task, score in state_dict["before"].items()}
        self._questions = state_dict["questions"]
