"""Runs that a scheduler stops and starts again."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)

TRY_AGAIN = 75
"""Exit status of a run that was stopped by a signal and saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


def restarted() -> bool:
    """Whether a scheduler has started this job before: Slurm after a requeue, or torchrun after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


@contextmanager
def preemptible() -> Iterator[None]:
    """While training, SIGTERM and SIGUSR1 let the rollout batch end, save a checkpoint and leave with `TRY_AGAIN`.

    Lightning does so at SIGTERM, and leaves with status 0; SIGUSR1, which Slurm is usually told to send before it takes a
    machine away, is made the same here. (Lightning's own handler of it saves wherever the batch happens to be.) Before
    training begins both end the process, as there is nothing to save.

    Raises:
        SystemExit: with `TRY_AGAIN`, after such a signal.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM)) if in_main_thread else None
    try:
        yield
    except SIGTERMException:
        log.warning(
            "stopped by a signal, after saving a checkpoint; exit status %d: the same command with ckpt_path=last goes on", TRY_AGAIN
        )
        raise SystemExit(TRY_AGAIN) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGUSR1, before)
