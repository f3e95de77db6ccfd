"""The base of the callbacks that watch GRACE."""

from typing import Any

import lightning as L

from src.modules.grace import GRACE
from src.modules.report import StepReport


def as_grace(module: L.LightningModule) -> GRACE:
    """The module as what these callbacks can watch.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(module, GRACE):
        raise TypeError(f"configs/callbacks/default.yaml watches module=grace, not {type(module).__name__}: choose other callbacks=...")
    return module


def last_report(module: GRACE) -> StepReport:
    """What the last rollout batch did.

    Raises:
        RuntimeError: there was none yet.
    """
    if module.report is None:
        raise RuntimeError("no rollout batch has been done yet, so there is no report of one")
    return module.report


class Watcher(L.Callback):
    """Looks on at three moments. Lightning's hooks, less the arguments that no one here needs.

    Lightning sends what `module.log` is given in `after_batch` to the loggers in one call, at the step that
    RewardDiagnostics names: the number of rollout batches done.
    """

    def at_start(self, trainer: L.Trainer, module: GRACE) -> None:
        """Before the first rollout batch (of this process: see `state_dict` for resumed runs)."""

    def after_batch(self, trainer: L.Trainer, module: GRACE) -> None:
        """After each rollout batch; `module.rollout_batches` counts it already."""

    def at_end(self, trainer: L.Trainer, module: GRACE) -> None:
        """After the last rollout batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_start(trainer, as_grace(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_batch(trainer, as_grace(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_end(trainer, as_grace(pl_module))
