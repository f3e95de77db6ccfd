"""Checkpoints counted in rollout batches."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from src.callbacks.probe import is_due
from src.callbacks.watcher import as_grace


class RolloutCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` and the best by a metric, every n rollout batches and when training ends.

    Lightning's own counts optimizer steps, misses any rollout batch whose steps do not add up to a multiple of its
    interval, and waits for a validation loop where the metric is not there yet. A batch that raises (a reward or
    gradient that is not finite) is never saved, so `last.ckpt` is the last good state.

    Args:
        dirpath: folder.
        every_n_rollout_batches: how often.
        monitor: the metric that decides which is best; where it is not known, only `last.ckpt` is written.
        mode: whether it should be `max` or `min`.
    """

    def __init__(self, dirpath: str, every_n_rollout_batches: int = 20, monitor: str | None = None, mode: str = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1 if monitor else 0,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            every_n_train_steps=1,  # not used: it only switches off saving at epoch ends
        )
        self.every = every_n_rollout_batches

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(as_grace(pl_module), self.every):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves, unless this state was saved already."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
