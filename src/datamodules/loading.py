"""Data loaders of streams that make whole batches."""

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


def load(stream: IterableDataset[Any]) -> DataLoader[Any]:
    """The batches of a stream as they are.

    The generator is there because an iterator of a loader draws a number when it is made, and a resumed run makes others than
    one that was never stopped: drawn from torch's own generator, that would set the two apart.
    """
    return DataLoader(stream, batch_size=None, generator=torch.Generator())
