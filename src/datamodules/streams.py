"""Endless or resumable streams of batches, and their data loaders."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

Record = TypeVar("Record")


def stream_loader(stream: IterableDataset[Any]) -> DataLoader[Any]:
    """Returns a loader that yields the batches of a stream as they are.

    Making its iterator draws a number from a generator. It is not torch's own, since a resumed run makes other iterators
    than an uninterrupted one, and the random states of the two would differ.
    """
    return DataLoader(stream, batch_size=None, generator=torch.Generator())


def batches_done(trainer: L.Trainer | None) -> int:
    """Returns how many batches a trainer has trained on, including those before an interruption; 0 without a trainer."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed) if trainer else 0  # type: ignore[attr-defined]


def require_one_batch(count: int, modules_per_batch: int, docstrings_per_module: int) -> None:
    """Raises ValueError if `count` records are fewer than a batch: an endless stream would search for one forever."""
    if count < modules_per_batch * docstrings_per_module:
        raise ValueError(
            f"{count} records do not fill one batch of {modules_per_batch} x {docstrings_per_module}: lower datamodule.modules_per_batch"
        )


def grouped_batches(
    records: Sequence[Record], origin: Callable[[Record], str], modules_per_batch: int, docstrings_per_module: int, rng: random.Random
) -> Iterator[list[Record]]:
    """Yields one shuffled pass in batches of `modules_per_batch` groups; a last incomplete batch is dropped.

    A group is `docstrings_per_module` records of one origin, so that they are hard to tell apart; where an origin has too
    few, neighbours in the order of origins are added.
    """
    by_origin: dict[str, list[Record]] = {}
    for record in records:
        by_origin.setdefault(origin(record), []).append(record)
    for members in by_origin.values():
        rng.shuffle(members)
    ordered = [record for name in sorted(by_origin) for record in by_origin[name]]
    groups = [ordered[i : i + docstrings_per_module] for i in range(0, len(ordered), docstrings_per_module)]
    groups = [group for group in groups if len(group) == docstrings_per_module]
    rng.shuffle(groups)
    for i in range(0, len(groups) - modules_per_batch + 1, modules_per_batch):
        yield [record for group in groups[i : i + modules_per_batch] for record in group]
