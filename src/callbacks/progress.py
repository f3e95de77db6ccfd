"""Progress in a terminal (a bar) and in a log file (a line now and then)."""

import logging
import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from src.callbacks.monitoring import as_policy_module, last_report
from src.modules.policy_module import PolicyModule
from src.utils.timing import clock

log = logging.getLogger(__name__)


class RolloutProgress(TQDMProgressBar):
    """A bar over batches with their headline (reward, or loss, and tokens a second) and time left.

    Where the output is no terminal it writes the same as lines through logging instead, at most one every
    `seconds_between_lines`, and one for the first and the last batch of an epoch. Time that is gone is this
    process's.
    """

    def __init__(self, seconds_between_lines: float = 15.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self.to_terminal = sys.stdout.isatty()
        if not self.to_terminal:
            self.disable()
        self._began = self._last_line = 0.0
        self._done_before: int | None = None  # batches of this epoch that an earlier process did

    def enable(self) -> None:
        """Enables the bar where there is a terminal to draw it in."""
        if self.to_terminal:
            super().enable()

    def batches_to_do(self, trainer: L.Trainer, module: PolicyModule, done: int) -> float:
        """Rollout batches of this epoch, `done` included; fewer than the loader has where max_steps ends it sooner.

        inf where neither says.
        """
        total = float(trainer.num_training_batches)
        if trainer.max_steps > 0:
            # max_steps counts optimizer steps, and a rollout batch takes several
            updates = max(1.0, last_report(module).update.get("updates", 1.0))
            total = min(total, done + math.ceil(max(0, trainer.max_steps - trainer.global_step) / updates))
        return total

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        return {**last_report(as_policy_module(pl_module)).headline()}

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self._done_before = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._done_before is None:  # a run that goes on in the middle of an epoch does not start it
            self._began, self._done_before = time.monotonic(), batch_idx

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        total = self.batches_to_do(trainer, as_policy_module(pl_module), batch_idx + 1)
        if self.to_terminal:
            self.train_progress_bar.total = total if math.isfinite(total) else None
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.is_global_zero:
            self._write_line(trainer, as_policy_module(pl_module), batch_idx + 1, total)

    def _write_line(self, trainer: L.Trainer, module: PolicyModule, done: int, total: float) -> None:
        now = time.monotonic()
        if done not in ((self._done_before or 0) + 1, total) and now - self._last_line < self.seconds_between_lines:
            return
        self._last_line = now
        taken = now - self._began
        metrics = self.get_metrics(trainer, module)
        left = clock(taken / (done - (self._done_before or 0)) * (total - done)) if math.isfinite(total) else "?"
        of = f"/{total:.0f}" if math.isfinite(total) else ""
        log.info(
            "%s %d%s  %s  %s gone, %s left",
            module.unit,
            done,
            of,
            "  ".join(f"{name} {value}" for name, value in metrics.items()),
            clock(taken),
            left,
        )
