"""Prepared triplets: on disk, mapped into memory, and served in shuffled batches from any position."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from src.records import Triplet

Places = NDArray[np.int64]
"""[n] indices of triplets among all of a data set."""


class PreparedTriplets:
    """The Arrow files of a prepared folder as one sequence; rows are read from disk when they are asked for.

    Args:
        folder: what `prepare` returned.
    """

    def __init__(self, folder: Path) -> None:
        self.rows = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))])

    def __len__(self) -> int:
        return len(self.rows)

    def triplets(self, places: Places) -> list[Triplet]:
        """The triplets at some places, in the order asked for."""
        columns = self.rows[places.tolist()]
        fields = zip(*(columns[name] for name in ("id", "query", "positive", "negatives", "source")), strict=True)
        return [Triplet(name, query, positive, tuple(negatives), source) for name, query, positive, negatives, source in fields]

    def by_source(self, places: Places) -> list[Places]:
        """The places apart by source, sources in the order of their names."""
        encoded = pc.dictionary_encode(self.rows.data.column("source")).unify_dictionaries().combine_chunks()
        names = np.array(encoded.dictionary.to_pylist(), dtype=object)
        rank = names.argsort().argsort()  # of each name among all
        own = rank[encoded.indices.to_numpy()[places]]
        order = own.argsort(kind="stable")
        return np.split(places[order], np.flatnonzero(np.diff(own[order])) + 1)


def held_out(count: int, share: float, seed: int) -> tuple[Places, Places]:
    """The places 0 .. count - 1 in two: those to train on, ascending, and a share (at least one) in a random order."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    held = max(1, round(share * count))
    return np.sort(order[held:]), order[:held]


class TripletBatches(IterableDataset[list[Triplet]]):
    """What is left of a shuffled pass over some triplets, in whole batches; the next pass has another order.

    `done` is asked at every start and says how many batches have been trained on since the beginning, over all passes: so
    neither a resumed run nor another of the trainer's epochs sees a batch again, and nothing is read to skip one.

    Args:
        prepared: all triplets.
        groups: places in it, each group [n] int64. A batch is of one group; what a pass leaves over of a group, or a group
            smaller than a batch, is not in it.
        batch_size: B.
        seed: of the order.
        done: see above.

    Raises:
        ValueError: no group fills a batch.
    """

    def __init__(
        self,
        prepared: PreparedTriplets,
        groups: Sequence[Places],
        batch_size: int,
        seed: int,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.prepared, self.groups, self.batch_size, self.seed, self.done = prepared, groups, batch_size, seed, done
        self.batches_per_pass = sum(len(group) // batch_size for group in groups)
        if self.batches_per_pass == 0:
            raise ValueError(
                f"{sum(map(len, groups)):,} records in {len(groups)} groups do not fill one batch of {batch_size}; give more data, or "
                "set datamodule.batch_size lower"
            )

    def __len__(self) -> int:
        return self.batches_per_pass

    def __iter__(self) -> Iterator[list[Triplet]]:
        number, begun = divmod(self.done(), self.batches_per_pass)
        for places in self.order(number)[begun:]:
            yield self.prepared.triplets(places)

    def order(self, number: int) -> Places:
        """[batches_per_pass, B] int64: the places that the batches of a pass are made of."""
        rng = np.random.default_rng([self.seed, number + 1])  # 0 is the split's
        batches = []
        for group in self.groups:
            whole = len(group) // self.batch_size
            batches.append(rng.permutation(group)[: whole * self.batch_size].reshape(whole, self.batch_size))
        return rng.permutation(np.concatenate(batches))
