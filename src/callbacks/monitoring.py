"""The base of the callbacks that watch a policy in training."""

from typing import Any

import lightning as L

from src.modules.grace import GRACE
from src.modules.policy_module import PolicyModule
from src.modules.training.metrics import BatchMetrics


def as_policy_module(module: L.LightningModule) -> PolicyModule:
    """The module as what these callbacks can watch.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(module, PolicyModule):
        raise TypeError(f"configs/callbacks/default.yaml watches module=grace, not {type(module).__name__}: choose other callbacks=...")
    return module


def as_grace(module: PolicyModule) -> GRACE:
    """The module as what has rewards and rationales.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(module, GRACE):
        raise TypeError(f"{type(module).__name__} writes no rationales and earns no rewards to watch: choose callbacks=contrastive")
    return module


def last_report(module: PolicyModule) -> BatchMetrics:
    """What the last batch did.

    Raises:
        RuntimeError: there was none yet.
    """
    if module.report is None:
        raise RuntimeError("no batch has been done yet, so there is no report of one")
    return module.report


class MonitoringCallback(L.Callback):
    """Looks on at three moments. Lightning's hooks, less the arguments that no one here needs.

    Lightning sends what `module.log` is given in `after_batch` to the loggers in one call, at the step that
    RewardDiagnostics or ContrastiveDiagnostics names: the number of batches done.
    """

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """Before the first batch (of this process: see `state_dict` for resumed runs)."""

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """After each batch; `module.rollout_batches` counts it already."""

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """After the last batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_start(trainer, as_policy_module(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_batch(trainer, as_policy_module(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_end(trainer, as_policy_module(pl_module))
