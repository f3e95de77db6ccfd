"""Runs that a signal stops, that a scheduler starts again, or that lose one of their processes."""

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

log = logging.getLogger(__name__)

TRY_AGAIN = 75
"""Exit status of a run that was stopped by a signal and has saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CONNECTION_LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process (has )?exited|socket .*closed", re.IGNORECASE)


class LostProcessError(RuntimeError):
    """Another process of this run has ended."""


def restarted() -> bool:
    """Returns whether a scheduler has restarted this job: Slurm after a requeue, or torchrun after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


class _StopFlag:
    """Replaces Lightning's signal connector: during training, SIGTERM, SIGUSR1 and the first Ctrl-C (SIGINT) only set a flag.

    Lightning's SIGTERM handler broadcasts from wherever the signal arrives, possibly inside another collective, and its SIGUSR1
    handler saves in the middle of a batch. Both are registered after the last hook before the first collective of training, so
    no callback could replace them in time; hence the assignment to a private attribute in `StopOnSignal`.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.requested = self.agreed = False
        self._previous: dict[int, Any] = {}

    def register_signal_handlers(self) -> None:
        self.requested = self.agreed = False
        self._previous = {number: signal.signal(number, self._request) for number in _STOP_SIGNALS}

    def teardown(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @property
    def received_sigterm(self) -> bool:
        """True if the run is to stop, which Lightning's loops read between batches; False after the last one, as the run ends anyway."""
        return self.agreed and not self.trainer.fit_loop.done

    def _request(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            log.warning(
                "stopping after this rollout batch, with a checkpoint; Ctrl-C again stops at once and loses the batches since the last"
            )
        self.requested = True


def stop_requested(trainer: L.Trainer | None) -> bool:
    """Returns whether a signal has asked this process to stop, in a trainer with `StopOnSignal`."""
    flag = None if trainer is None else trainer._signal_connector
    return isinstance(flag, _StopFlag) and flag.requested


def stop_between_phases(trainer: L.Trainer | None) -> None:
    """Ends the training of all ranks if a signal has reached any of them; to be called where a checkpoint is that of the last batch.

    Raises:
        SIGTERMException: it has; `preemptible` handles it.
    """
    if trainer is not None and trainer.strategy.reduce_boolean_decision(stop_requested(trainer), all=False):
        raise SIGTERMException


class StopOnSignal(L.Callback):
    """Stops all ranks after the same phase or rollout batch if a signal reaches any of them; see `preemptible`."""

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._flag = _StopFlag(trainer)
        trainer._signal_connector = self._flag  # type: ignore[assignment]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._flag.agreed = trainer.strategy.reduce_boolean_decision(self._flag.requested, all=False)


class BeginNextEpoch(L.Callback):
    """Starts the next epoch when a run resumes from the last batch of an epoch.

    Lightning 2.6 treats such a checkpoint as one in the middle of the epoch and does not count the next epoch as started. A
    further resume would then count the epoch's batches from zero and train on more of them than requested.
    """

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop
        epoch: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epoch.processed == epoch.started:
            loop.reset_restart_stage()


@contextmanager
def preemptible() -> Iterator[None]:
    """Turns a stop signal during training into: finish the phase, save a checkpoint of the last whole batch, exit with `TRY_AGAIN`.

    Phases are the writing of a batch's rationales, its update, and each task of an evaluation.

    The trainer needs `StopOnSignal`. Before training starts these signals end the process, as there is nothing to save.

    Raises:
        SystemExit: after such a signal. Of several processes rank 0 exits last and with `TRY_AGAIN`, the others with 0, because
            launchers end all processes when one fails; under torchrun all exit with `TRY_AGAIN`.
        LostProcessError: the connection to another rank broke, because its process has ended.
    """
    try:
        yield
    except SIGTERMException:
        log.warning(
            "stopped by a signal, after saving a checkpoint; exit status %d: the same command with ckpt_path=last goes on", TRY_AGAIN
        )
        raise SystemExit(_exit_status()) from None
    except RuntimeError as error:
        ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if ranks == 1 or not (isinstance(error, distributed.DistNetworkError) or _CONNECTION_LOST.search(str(error))):
            raise
        raise LostProcessError(
            f"rank {distributed.get_rank()}: another of the {ranks} processes has ended, see its last output (a process killed for "
            "lack of memory prints none). Go on with ckpt_path=last"
        ) from error


def _exit_status(seconds: float = 2.0) -> int:
    """Waits until all ranks have saved; see `preemptible`."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return TRY_AGAIN
    distributed.barrier()
    if distributed.is_torchelastic_launched():
        return TRY_AGAIN
    if distributed.get_rank() != 0:
        return 0
    time.sleep(seconds)  # srun --kill-on-bad-exit would kill ranks that have not left yet and report their status instead
    return TRY_AGAIN
