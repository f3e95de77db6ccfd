"""A mend of Lightning's loops: runs that go on where an epoch ended."""

from typing import Any

import lightning as L


class BeginNextEpoch(L.Callback):
    """Lets a run that goes on from the last batch of an epoch begin the next one.

    Lightning (2.6) takes it for one in the middle of an epoch, does not count the next as begun, and so writes checkpoints from which
    a further resume counts the epoch's batches from its own first: the run would do more of them than it was asked for.
    """

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop
        epoch: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epoch.processed == epoch.started:
            loop.reset_restart_stage()
