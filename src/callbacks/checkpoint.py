"""Checkpoints counted in rollout batches."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from src.callbacks.monitoring import as_policy_module, is_due
from src.modules.policy_module import PolicyModule
from src.utils.checkpoint_io import ABOUT, remove, tidy

LAST, BEST = "last.ckpt", "best.ckpt"


class RolloutCheckpoint(ModelCheckpoint):
    """Saves `batch_<n>.ckpt` every n rollout batches, when a signal stops the run and when training ends.

    `last.ckpt` and `best.ckpt` are links, moved once a checkpoint is complete on disk. The checkpoint before the last is kept too, in
    case the last is damaged; others are removed before the next is written, so there are never more than three. A batch that raises (a
    reward or gradient that is not finite) is never saved.

    A run that goes back to an earlier checkpoint of its folder gives up what came after it, the best checkpoint too.

    Lightning's ModelCheckpoint counts optimizer steps, misses rollout batches whose steps do not add up to a multiple of its interval,
    and waits for a validation loop.

    Args:
        dirpath: folder.
        every_n_rollout_batches: how often.
        monitor: the metric that decides which is best. One named a/b counts only at the batch that the metric a/rollout_batches
            names, if there is such a metric.
        mode: `max` or `min`.
    """

    def __init__(self, dirpath: str, every_n_rollout_batches: int = 20, monitor: str | None = None, mode: str = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=1 if monitor else 0,
            every_n_train_steps=1,  # not used: it only switches off saving at epoch ends
        )
        self.every = every_n_rollout_batches
        self._saved_at = -1
        self._metrics: dict[str, float] = {}  # the last values when the loaded checkpoint was saved

    # ---- when

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            tidy(self._folder)
        origin = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        if origin is not None and origin.parent == self._folder.resolve():
            self._go_on(trainer, as_policy_module(pl_module), origin)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        module = as_policy_module(pl_module)
        if is_due(module, self.every):
            self.save(trainer, module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(
            exception, SIGTERMException
        ):  # raised where nothing of a batch has changed the state; others may come in the middle of it
            self.save(trainer, as_policy_module(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, as_policy_module(pl_module))

    # ---- what

    def save(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """Saves a checkpoint, unless there is one of this batch."""
        batches = module.rollout_batches
        if trainer.state.fn != TrainerFn.FITTING or batches == self._saved_at:
            return
        path = self._folder / f"batch_{batches}.ckpt"
        self.current_score = self._fresh_score(trainer, batches)
        is_best = self.current_score is not None and self._is_better(self.current_score)
        if trainer.is_global_zero:
            self._prune()
        if is_best:
            self.best_model_score, self.best_model_path = self.current_score, str(path)
        self.last_model_path = str(path)  # before saving, as it is part of what is saved
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._save_checkpoint(trainer, str(path))
        self._saved_at = batches
        if trainer.is_global_zero:
            self._point(LAST, path)
            if is_best:
                self._point(BEST, path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[ABOUT] = {
            "rollout_batches": as_policy_module(pl_module).rollout_batches,
            "optimizer_steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "monitor": self.monitor,
            "score": None if self.current_score is None else float(self.current_score),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"best": Path(self.best_model_path).name, "best_score": self.best_model_score, "metrics": self._metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._metrics = dict(state_dict.get("metrics", state_dict.get("not_logged_yet", {})))  # the latter in earlier checkpoints
        best = self._folder / state_dict["best"]
        if state_dict["best"] and best.exists():  # else a run that branches off begins without a best
            self.best_model_path, self.best_model_score = str(best), state_dict["best_score"]

    # ---- the folder

    @property
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _go_on(self, trainer: L.Trainer, module: PolicyModule, origin: Path) -> None:
        """Makes the resumed checkpoint the last one, and its best the best; restores the metrics, which a sweep may ask for."""
        self._saved_at = module.rollout_batches
        if trainer.is_global_zero:
            self._point(LAST, origin)
            if self.best_model_path:
                self._point(BEST, Path(self.best_model_path))
            else:
                (self._folder / BEST).unlink(missing_ok=True)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})

    def _prune(self) -> None:
        kept = {(self._folder / link).resolve() for link in (LAST, BEST)}
        for path in self._folder.glob("batch_*.ckpt"):
            if path.resolve() not in kept:
                remove(path)

    def _point(self, link: str, path: Path) -> None:
        new = self._folder / f".{link}.{os.getpid()}.link"
        new.unlink(missing_ok=True)
        new.symlink_to(path.name)
        new.replace(self._folder / link)

    def _fresh_score(self, trainer: L.Trainer, batches: int) -> Tensor | None:
        """Returns the monitored metric if it was measured on these weights."""
        if self.monitor is None or self.monitor not in trainer.callback_metrics:
            return None
        measured_at = trainer.callback_metrics.get(f"{self.monitor.rpartition('/')[0]}/rollout_batches")
        if measured_at is not None and int(measured_at) != batches:
            return None
        return trainer.callback_metrics[self.monitor].detach().cpu()

    def _is_better(self, score: Tensor) -> bool:
        if self.best_model_score is None:
            return not bool(torch.isnan(score))
        return bool(score > self.best_model_score if self.mode == "max" else score < self.best_model_score)
