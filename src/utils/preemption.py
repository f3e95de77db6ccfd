"""Runs that a scheduler stops and starts again."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

log = logging.getLogger(__name__)

TRY_AGAIN = 75
"""Exit status of a run that was stopped by a signal and saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


def restarted() -> bool:
    """Whether a scheduler has started this job before: Slurm after a requeue, or torchrun after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


class Signals(_SignalConnector):
    """In the place of Lightning's handling of signals: while training, SIGTERM and SIGUSR1 do no more than set a flag.

    Lightning's own handler of SIGTERM talks to the other ranks from wherever the signal finds it, which may be inside of
    something else that the ranks do together, and its handler of SIGUSR1 saves in the middle of a batch.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self._original_handlers: dict[Any, Any] = {}
        self._told = self._agreed = False

    def register_signal_handlers(self) -> None:
        self._told = self._agreed = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._original_handlers[number] = signal.getsignal(number)
            self._register_signal(number, self._note)

    def agree(self) -> None:
        """All ranks stop where one of them was told to; to be called by all together."""
        self._agreed = self.trainer.strategy.reduce_boolean_decision(self._told, all=False)

    @property
    def received_sigterm(self) -> bool:  # type: ignore[override]
        """What Lightning's loops ask between batches. After the last one nothing is left to be stopped: the run ends.

        It could not be gone on with either: Lightning begins no training that has no batch to do, and so ends none.
        """
        return self._agreed and not self.trainer.fit_loop.done

    def _note(self, *_: Any) -> None:
        self._told = True


class StopTogether(L.Callback):
    """Lets every rank end the same rollout batch where a signal tells one of them, or all, to stop; see `preemptible`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._signals = Signals(trainer)
        trainer._signal_connector = self._signals

    def on_train_batch_end(self, *_: Any) -> None:
        self._signals.agree()


@contextmanager
def preemptible() -> Iterator[None]:
    """While training, SIGTERM and SIGUSR1 let the rollout batch end, save a checkpoint and leave with `TRY_AGAIN`.

    For this the trainer needs `StopTogether`. Before training begins both end the process, as there is nothing to save.

    Raises:
        SystemExit: with `TRY_AGAIN`, after such a signal. Of several processes rank zero does, and is the last; the others
            leave with 0, as launchers end all where one fails. torchrun alone wants to see the same of all.
    """
    try:
        yield
    except SIGTERMException:
        log.warning(
            "stopped by a signal, after saving a checkpoint; exit status %d: the same command with ckpt_path=last goes on", TRY_AGAIN
        )
        raise SystemExit(_status_when_all_have_saved()) from None


def _status_when_all_have_saved(seconds: float = 2.0) -> int:
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return TRY_AGAIN
    distributed.barrier()
    if distributed.is_torchelastic_launched():
        return TRY_AGAIN
    if distributed.get_rank() != 0:
        return 0
    time.sleep(seconds)  # srun --kill-on-bad-exit would take others that are about to leave, and report their end for this one's
    return TRY_AGAIN
