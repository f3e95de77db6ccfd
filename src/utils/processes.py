"""What a run of several processes needs of the process that it is in."""

import logging

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


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
