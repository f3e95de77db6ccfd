"""Batches in which instances of one origin stand together, so that batch mates are hard to tell apart."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Record = TypeVar("Record")


def require_one_batch(count: int, modules_per_batch: int, docstrings_per_module: int) -> None:
    """Refuses data that could not fill a batch, of which an endless stream would search for one for ever.

    Raises:
        ValueError: `count` records are too few.
    """
    if count < modules_per_batch * docstrings_per_module:
        raise ValueError(
            f"{count} records do not fill one batch of {modules_per_batch} x {docstrings_per_module}; "
            "give more data, or ask for a smaller batch"
        )


def grouped_batches(
    records: Sequence[Record], origin: Callable[[Record], str], modules_per_batch: int, docstrings_per_module: int, rng: random.Random
) -> Iterator[list[Record]]:
    """One pass over `records` in batches of `modules_per_batch` * `docstrings_per_module`; the last incomplete batch is dropped.

    Each group holds records of one origin, or of neighbouring origins in sorted order where one has too few. With
    `docstrings_per_module` = 1 this is a plain shuffle.
    """
    by_origin: dict[str, list[Record]] = {}
    for record in records:
        by_origin.setdefault(origin(record), []).append(record)
    for members in by_origin.values():
        rng.shuffle(members)
    ordered = [record for name in sorted(by_origin) for record in by_origin[name]]
    chunks = [ordered[i : i + docstrings_per_module] for i in range(0, len(ordered), docstrings_per_module)]
    chunks = [chunk for chunk in chunks if len(chunk) == docstrings_per_module]
    rng.shuffle(chunks)
    for i in range(0, len(chunks) - modules_per_batch + 1, modules_per_batch):
        yield [record for chunk in chunks[i : i + modules_per_batch] for record in chunk]
