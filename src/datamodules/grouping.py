"""Batches in which instances of one origin stand together, so that batch mates are hard to tell apart."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Record = TypeVar("Record")


def require_one_batch(count: int, groups: int, per_group: int) -> None:
    """Refuses data that could not fill a batch, of which an endless stream would search for one for ever.

    Raises:
        ValueError: `count` records are too few.
    """
    if count < groups * per_group:
        raise ValueError(f"{count} records do not fill one batch of {groups} x {per_group}; give more data, or ask for a smaller batch")


def grouped_batches(
    records: Sequence[Record], origin: Callable[[Record], str], groups: int, per_group: int, rng: random.Random
) -> Iterator[list[Record]]:
    """One pass over `records` in batches of `groups` * `per_group`; the last incomplete batch is dropped.

    Each group holds records of one origin, or of neighbouring origins in sorted order where one has too few. With
    `per_group` = 1 this is a plain shuffle.
    """
    by_origin: dict[str, list[Record]] = {}
    for record in records:
        by_origin.setdefault(origin(record), []).append(record)
    for members in by_origin.values():
        rng.shuffle(members)
    ordered = [record for name in sorted(by_origin) for record in by_origin[name]]
    chunks = [ordered[i : i + per_group] for i in range(0, len(ordered), per_group)]
    chunks = [chunk for chunk in chunks if len(chunk) == per_group]
    rng.shuffle(chunks)
    for i in range(0, len(chunks) - groups + 1, groups):
        yield [record for chunk in chunks[i : i + groups] for record in chunk]
