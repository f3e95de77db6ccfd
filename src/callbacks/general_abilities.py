"""Whether training keeps what the policy could do besides embedding."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from src.callbacks.monitoring import MonitoringCallback
from src.callbacks.probe import undisturbed
from src.evaluation.abilities import AbilityScore, Change, ability_markdown, ability_metrics, ability_table, compare, run_abilities
from src.modules.policy_module import PolicyModule
from src.utils.tracking import log_metrics, log_text, write_text

log = logging.getLogger(__name__)


class GeneralAbilities(MonitoringCallback):
    """Scores lm-eval tasks when training starts and when it ends, and says what was kept, what lost, and what is unclear.

    Logs abilities/<task>/before, after, gain, gain_low and gain_high; writes a table to `path` and to the loggers.

    Args:
        path: of the table (Markdown).
        tasks, packages, cache_dir, count, batch_size: see `run_abilities`.
        tolerance: a loss no larger than this counts as none; see `compare`.
    """

    def __init__(
        self,
        path: str,
        tasks: str | Sequence[str],
        packages: Sequence[str],
        cache_dir: str,
        count: int = 200,
        batch_size: int = 16,
        tolerance: float = 0.02,
    ) -> None:
        self.path, self.tolerance = Path(path), tolerance
        self.asked: dict[str, Any] = {"tasks": tasks if isinstance(tasks, str) else list(tasks), "packages": list(packages)}
        self.asked |= {"cache_dir": cache_dir, "count": count, "batch_size": batch_size}
        self.before: dict[str, AbilityScore] = {}
        self._questions: dict[str, Any] | None = None  # that the starting policy was asked
        self.changes: dict[str, Change] = {}

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        questions = {name: self.asked[name] for name in ("tasks", "packages", "count")}
        if self._questions not in (None, questions):
            log.warning("general abilities are asked for by other questions than before the stop: they are not compared with the start's")
            self.before = {}
        elif self._questions is None:  # else resumed: the checkpoint brought what the starting policy scored
            log.info("scoring the starting policy's general abilities")
            with undisturbed(module):
                self.before = run_abilities(module.policy, **self.asked)
        self._questions = questions

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not self.before:
            return
        log.info("scoring the trained policy's general abilities")
        with undisturbed(module):
            after = run_abilities(module.policy, **self.asked)
        self.changes = {task: compare(score, after[task], self.tolerance) for task, score in self.before.items()}
        log_metrics(trainer, ability_metrics(self.changes), module.rollout_batches)
        if trainer.is_global_zero:
            Console().print(ability_table(self.changes))
            write_text(self.path, ability_markdown(self.changes))
            log_text(trainer, ability_markdown(self.changes), "report/abilities.md")

    def state_dict(self) -> dict[str, Any]:
        return {"before": {task: asdict(score) for task, score in self.before.items()}, "questions": self._questions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = {task: AbilityScore(**score) for task, score in state_dict["before"].items()}
        self._questions = state_dict["questions"]
