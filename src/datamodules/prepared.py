"""Serves prepared triplets: mapped from disk into memory, in shuffled batches that can start anywhere."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from src.datamodules.files import find_files, hub_name
from src.datamodules.preparation import Report, load_report, prepare
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import Reader
from src.datamodules.rows import BadRecord, Chunk
from src.datamodules.streams import batches_done, stream_loader
from src.records import Triplet
from src.utils.data_contents import DataContents

log = logging.getLogger(__name__)

Places = NDArray[np.int64]
"""[n] indices of triplets among all of a data set."""


class PreparedTriplets:
    """The Arrow files of a folder that `prepare` made, as one sequence. Rows are read from disk when asked for."""

    def __init__(self, folder: Path) -> None:
        self.rows = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))])

    def __len__(self) -> int:
        return len(self.rows)

    def triplets(self, places: Places) -> list[Triplet]:
        """Returns the triplets at some indices, in that order."""
        columns = self.rows[places.tolist()]
        fields = zip(*(columns[name] for name in ("id", "query", "positive", "negatives", "source")), strict=True)
        return [Triplet(id, query, positive, tuple(negatives), source) for id, query, positive, negatives, source in fields]

    def by_source(self, places: Places) -> list[Places]:
        """Splits indices by source, in the order of the sources' names."""
        encoded = pc.dictionary_encode(self.rows.data.column("source")).unify_dictionaries().combine_chunks()
        rank = np.array(encoded.dictionary.to_pylist(), dtype=object).argsort().argsort()  # of each name among all
        ranks = rank[encoded.indices.to_numpy()[places]]
        order = ranks.argsort(kind="stable")
        return np.split(places[order], np.flatnonzero(np.diff(ranks[order])) + 1)


def held_out(count: int, share: float, seed: int) -> tuple[Places, Places]:
    """Splits the indices 0 .. count - 1: those to train on, ascending, and a share (at least one) in random order."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    held = max(1, round(share * count))
    return np.sort(order[held:]), order[:held]


@dataclass(eq=False)
class TripletBatches(IterableDataset[list[Triplet]]):
    """Streams the rest of a shuffled pass over triplets in batches of equal size. Each pass has another order.

    Each iterator starts after the batches that `done()` counts, over all passes, so that a resumed run and the trainer's next
    epoch go on with new ones. Skipped batches are not read.

    Attributes:
        prepared: all triplets.
        groups: indices into it. A batch is drawn from one group; records that do not fill a batch of their group are left out
            of the pass.
        batch_size: B.
        seed: of the order.

    Raises:
        ValueError: no group fills a batch.
    """

    prepared: PreparedTriplets
    groups: Sequence[Places]
    batch_size: int
    seed: int
    done: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(
                f"{sum(map(len, self.groups)):,} records in {len(self.groups)} groups do not fill one batch of {self.batch_size}: give "
                "more data, or lower datamodule.batch_size"
            )

    def __len__(self) -> int:
        return sum(len(group) // self.batch_size for group in self.groups)

    def __iter__(self) -> Iterator[list[Triplet]]:
        number, begun = divmod(self.done(), len(self))
        for places in self.order(number)[begun:]:
            yield self.prepared.triplets(places)

    def order(self, number: int) -> Places:
        """[batches of a pass, B] int64: the indices in each batch of a pass."""
        rng = np.random.default_rng([self.seed, number + 1])  # 0 is the split's
        batches = []
        for group in self.groups:
            full = len(group) // self.batch_size
            batches.append(rng.permutation(group)[: full * self.batch_size].reshape(full, self.batch_size))
        return rng.permutation(np.concatenate(batches))


class PreparedDataModule(L.LightningDataModule):
    """Shuffled batches of the records of files. An epoch is one pass. Once data is looked at, `read_as` says which columns are read.

    Args:
        path, files, revision: see `find_files`.
        reader: (columns=...) -> what makes triplets of the files' rows.
        limit: makes the limit on the length of every text; called when the data is prepared.
        cache_dir: for prepared data.
        batch_size: B.
        group_by_source: draw each batch from one source, so that its texts are harder to tell apart.
        val_fraction: share of the records that is held out, at least one record, chosen by `seed`.
        on_bad_record: `stop` the run if records are malformed, after all were found, or `skip` them.
        num_proc: processes that prepare; None for one a core.
        columns: names of columns by role; those of null are recognised. See `given_columns`.
        seed: of the order and of what is held out.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        files: Sequence[str],
        reader: Callable[..., Reader],
        limit: Callable[[], PromptLimit],
        cache_dir: str,
        batch_size: int = 32,
        group_by_source: bool = False,
        val_fraction: float = 0.01,
        on_bad_record: Literal["stop", "skip"] = "stop",
        num_proc: int | None = None,
        revision: str | None = None,
        columns: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"datamodule.val_fraction={val_fraction}: it is a share between 0 and 1")
        if on_bad_record not in ("stop", "skip"):
            raise ValueError(f"datamodule.on_bad_record={on_bad_record!r}: it is stop or skip")
        for name, value in (("batch_size", batch_size), ("num_proc", num_proc)):
            if value is not None and value < 1:
                raise ValueError(f"datamodule.{name}={value}: it must be at least 1")
        self.path = [str(one) for one in ([path] if isinstance(path, str) else path)]
        self.files, self.revision, self.reader, self.limit = list(files), revision, reader(columns=dict(columns or {})), limit
        self.cache_dir, self.num_proc, self.on_bad_record = cache_dir, num_proc, on_bad_record
        self.batch_size, self.group_by_source, self.val_fraction, self.seed = batch_size, group_by_source, val_fraction, seed
        self._prepared: PreparedTriplets | None = None
        self.report = Report()
        self.read_as = ""

    def prepare_data(self) -> None:
        """Finds, checks and filters the records, unless that was done before, and sets `report`.

        Raises:
            FileNotFoundError: there is no such data, or no tokenizer.
            ValueError: records are malformed and `on_bad_record` is stop, or there is none to train on.
        """
        if self._prepared is not None:
            return
        found, limit = find_files(self.path, self.files, self.revision), self.limit()
        self.read_as = " | ".join(dict.fromkeys(filter(None, (self.reader.describe(file) for file in found))))
        log.info("read as %s", self.read_as)
        folder = prepare(found, self.reader, limit, self.cache_dir, self.num_proc)
        self.report = report = load_report(folder)
        counts = (
            f"{', '.join(self.path)}: {report.records:,} records, of which {report.kept:,} can be used, {report.too_long:,} have a text "
            f"whose prompt is longer than module.max_prompt_tokens={limit.max_prompt_tokens}, and {report.bad:,} are malformed"
        )
        if report.equal_negatives:
            counts += f"; {report.equal_negatives:,} negatives that equal the query or the positive of their record are left out"
        if report.bad and self.on_bad_record == "stop":
            raise ValueError(f"{counts}:\n{report.bad_lines()}\ncorrect them, or leave them out with datamodule.on_bad_record=skip")
        if not report.kept:
            raise ValueError(f"{counts}: there is nothing to train on")
        log.info(counts)
        if report.bad:
            log.warning("%s malformed records are left out:\n%s", f"{report.bad:,}", report.bad_lines())
        self._prepared = PreparedTriplets(folder)

    @property
    def prepared(self) -> PreparedTriplets:
        """All records that can be used."""
        if self._prepared is None:
            self.prepare_data()  # Lightning calls it in one process of a machine; the others find what that one made
        assert self._prepared is not None
        return self._prepared

    def contents(self) -> DataContents:
        """Returns what the files hold, whether or not it can be used."""
        rows, source = self.prepared, ", ".join([self.path] if isinstance(self.path, str) else self.path)
        return DataContents(Path(source).name or source, source, self.report.digest, self.report.records, len(rows))

    def split(self) -> tuple[Places, Places]:
        """Returns the indices of the records to train on, and of those held out."""
        return held_out(len(self.prepared), self.val_fraction, self.seed)

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        train, _ = self.split()
        groups = self.prepared.by_source(train) if self.group_by_source else [train]
        small = [len(group) for group in groups if len(group) < self.batch_size]
        if small and len(small) < len(groups):
            log.warning(
                "%d sources have fewer records than a batch of %d and are never trained on, %s records in all: datamodule.group_by_source "
                "draws each batch from one source",
                *(len(small), self.batch_size, f"{sum(small):,}"),
            )
        return stream_loader(TripletBatches(self.prepared, groups, self.batch_size, self.seed, lambda: batches_done(self.trainer)))

    @property
    def hub_names(self) -> list[str]:
        """The names of its data sets on the hub."""
        return [name for path in self.path if (name := hub_name(path))]

    @property
    def description(self) -> str:
        """The data in words, for the model card: of a local path its last name alone."""
        return f"{self.report.kept:,} records of {', '.join(path if hub_name(path) else Path(path).name for path in self.path)}"

    def preview(self, count: int) -> list[Triplet | BadRecord]:
        """Returns the first records as they are read, malformed ones as such, without preparing the data.

        Raises:
            FileNotFoundError, ValueError: there is no such data, or a file lacks a column.
        """
        files = find_files(self.path, self.files, self.revision)
        self.read_as = self.reader.describe(files[0])
        return list(islice((record for file in files for record in self.reader.read(Chunk(file))), count))

    def fixed_triplets(self, count: int) -> list[Triplet]:
        """Returns the same held-out records at every call; fewer than `count` if fewer are held out."""
        return self.prepared.triplets(self.split()[1][:count])
