"""Parts of a run around Lightning's trainer: objects from groups of configs, and less output."""

import logging
import warnings
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",  # batches are text, made faster than they are used
    r".*You have overridden `transfer_batch_to_device`.*",
    r".*module\(s\) in eval mode at the start of training.*",  # as transformers loads them
    r".*Your `IterableDataset` has `__len__` defined.*",  # exact, in one process
    r".*Checkpoint directory .* exists and is not empty.*",  # of a resumed run
    r".*your dataloader is not resumable.*",  # it reads its position from the trainer
)


def instantiate_all(configs: DictConfig | None, group: str) -> list[Any]:
    """Returns the objects that a group of configs describes, in its order.

    Args:
        configs: name -> config with a `_target_`, or one such config. An entry that is None (`callbacks.mteb=null`) is left out.
        group: its name, for errors.

    Raises:
        ValueError: an entry is neither null nor a config with a `_target_`.
    """
    if configs and "_target_" in configs:
        return [instantiate(configs)]
    entries = {name: config for name, config in (configs or {}).items() if config is not None}
    for name, config in entries.items():
        if not isinstance(config, DictConfig) or "_target_" not in config:
            raise ValueError(f"{group}.{name!s} has no _target_ (it is {config!r}): give it one in configs/{group}, or set it to null")
    return [instantiate(config) for config in entries.values()]


def quiet_lightning() -> None:
    """Hides Lightning's warnings about what is intended here, and its advertisements, for the rest of the process."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())


def prepare_processes(trainer: L.Trainer) -> None:
    """Reduces logging to errors on all ranks but 0.

    Raises:
        ValueError: a sweep over runs that start their own processes; each of these would start the sweep again.
    """
    if trainer.world_size == 1:
        return
    if not trainer.is_global_zero:
        logging.getLogger().setLevel(logging.ERROR)
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    if sweeping and trainer.strategy.launcher is not None:
        raise ValueError(
            f"a sweep (-m) over runs of {trainer.world_size} processes needs a launcher that starts them: use hydra/launcher=slurm, or "
            "start the runs one by one without -m"
        )
