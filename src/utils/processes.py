"""What a run of several processes needs of the process that it is in."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import distributed

_LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process (has )?exited|socket .*closed", re.IGNORECASE)


class LostProcessError(RuntimeError):
    """Another process of this run is gone."""


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Says what it means where the connection to another process breaks: the ranks that are left end at once, in one line.

    Raises:
        LostProcessError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if not together or not (isinstance(error, distributed.DistNetworkError) or _LOST.search(str(error))):
            raise
        raise LostProcessError(
            f"rank {distributed.get_rank()}: another of the {distributed.get_world_size()} processes has ended, see what it said last (a "
            "process that was killed, for memory say, says nothing). Go on with ckpt_path=last"
        ) from error


def prepare(trainer: L.Trainer) -> None:
    """Lets rank zero alone speak, and refuses what would start wrongly; does nothing for one process.

    Raises:
        ValueError: a sweep whose runs would start their own processes, which would be given the whole sweep.
    """
    if trainer.world_size == 1:
        return
    if not trainer.is_global_zero:
        logging.getLogger().setLevel(logging.ERROR)
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    if sweeping and trainer.strategy.launcher is not None:
        raise ValueError(
            f"a sweep (-m) over runs of {trainer.world_size} processes needs a launcher that starts them: hydra/launcher=slurm, or one run "
            "after the other without -m"
        )
