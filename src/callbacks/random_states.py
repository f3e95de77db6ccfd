"""Random states in checkpoints, so that a resumed run draws the numbers that it would have drawn."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class RandomStates(L.Callback):
    """Saves the random states of every rank with each checkpoint, and sets them before the first batch of a resumed run.

    Not earlier: data loaders and evaluations at the start of a process may draw too. A rank that the saved run did not have keeps the
    states of its seed.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        own = random_states()
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return {"ranks": [own]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["ranks"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank < len(self._saved):
            set_random_states(self._saved[trainer.global_rank])
        self._saved = []


def random_states() -> dict[str, Any]:
    """Returns the states of Python, numpy, torch and every GPU of this process, in types that weights-only loading reads."""
    name, keys, *rest = np.random.get_state()
    numpy_state = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "torch.cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["torch.cuda"])
