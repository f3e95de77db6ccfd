"""Progress of a run, and an estimate of its time."""

import logging
import math
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from src.callbacks.monitoring import as_policy_module, last_report
from src.modules.grace import GRACE
from src.modules.policy_module import PolicyModule
from src.utils.machine import describe_machine, has_gpu, matrix_speed
from src.utils.timing import clock

log = logging.getLogger(__name__)

_REACHED = {"bf16-mixed": 0.2, "32-true": 0.5}  # share of the speed of matrix products that smollm2_sup reaches on two CPU cores
_OTHERWISE = 60  # seconds for reading data, MTEB's own work and reports


class RolloutProgress(TQDMProgressBar):
    """Shows batches, reward or loss, tokens a second and the time left: a bar in a terminal, else lines in the log.

    Args:
        seconds_between_lines: least time between two lines; the first and the last batch of an epoch always have one.
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
        """Enables the bar if there is a terminal."""
        if self.to_terminal:
            super().enable()

    def batches_to_do(self, trainer: L.Trainer, module: PolicyModule, done: int) -> float:
        """Returns the rollout batches of this epoch, `done` included, within trainer.max_steps; inf where nothing bounds them."""
        total = float(trainer.num_training_batches)
        if trainer.max_steps > 0:  # optimizer steps, of which a rollout batch takes several
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
        if self._done_before is None:  # not at the epoch's start, which a run that is resumed within an epoch does not have
            self._began, self._done_before = time.monotonic(), batch_idx

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        total = self.batches_to_do(trainer, as_policy_module(pl_module), batch_idx + 1)
        if self.to_terminal:
            self.train_progress_bar.total = total if math.isfinite(total) else None
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.is_global_zero:
            self._write_line(trainer, as_policy_module(pl_module), batch_idx + 1, total)

    def _write_line(self, trainer: L.Trainer, module: PolicyModule, done: int, total: float) -> None:
        now, before = time.monotonic(), self._done_before or 0
        if done not in (before + 1, total) and now - self._last_line < self.seconds_between_lines:
            return
        self._last_line, taken = now, now - self._began
        of, left = (f"/{total:.0f}", clock(taken / (done - before) * (total - done))) if math.isfinite(total) else ("", "?")
        metrics = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
        log.info("%s %d%s  %s  %s gone, %s left", module.unit, done, of, metrics, clock(taken), left)


class TimeEstimate(L.Callback):
    """Logs at the start of a run the machine, the number of batches and, on CPUs, the estimated minutes.

    The estimate is arithmetic over a measured speed: 2 operations a parameter and token to read or write it, 6 to train on it.

    Args:
        evaluated_texts: distinct texts of all evaluations together.
    """

    def __init__(self, evaluated_texts: int = 0) -> None:
        self.evaluated_texts = evaluated_texts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyModule) or not trainer.is_global_zero:
            return
        batches, data = trainer.limit_train_batches, trainer.datamodule  # type: ignore[attr-defined]
        size = getattr(data, "batch_size", 0)
        if not isinstance(batches, int) or not size:
            return
        run = f"{type(pl_module).__name__}: {batches} batches of {size} texts on {describe_machine()}"
        if has_gpu():  # which is bound by kernel launches, and not by arithmetic
            log.info(run)
            return
        operations = self._operations(pl_module, batches, size, getattr(data, "negatives", 0))
        precision = str(trainer.precision)
        seconds = operations / (_REACHED.get(precision, _REACHED["bf16-mixed"]) * matrix_speed(precision != "32-true")) + _OTHERWISE
        minutes = max(1, math.ceil(seconds / 60))
        log.info(
            "%s; about %d minutes, evaluation included: until %s",
            run,
            minutes,
            (datetime.now() + timedelta(minutes=minutes)).strftime("%H:%M"),
        )

    def _operations(self, module: PolicyModule, batches: int, instances: int, negatives: int) -> float:
        parameters = sum(p.numel() for p in module.policy.model.parameters())
        prompt = 0.6 * module.settings.max_prompt_tokens
        written = module.engine.max_new_tokens if module.settings.rationale != "none" else 0
        positives = instances * (prompt + written * (module.hparams["num_generations"] if isinstance(module, GRACE) else 0))
        others = instances * (1 + negatives) * (prompt + written)
        read = self.evaluated_texts * (prompt + written) + batches * (positives + others)
        return parameters * (2 * read + 6 * batches * (positives + others))
