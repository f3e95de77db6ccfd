"""Triplets or texts from files of one's own, prepared once: see preparation.py."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import lightning as L
from torch.utils.data import DataLoader

from src.datamodules.docstring_datamodule import batches_done
from src.datamodules.files import find_files
from src.datamodules.loading import load
from src.datamodules.preparation import Report, load_report, prepare
from src.datamodules.prepared import Places, PreparedTriplets, TripletBatches, held_out
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import Reader
from src.records import Triplet

log = logging.getLogger(__name__)


class PreparedDataModule(L.LightningDataModule):
    """Shuffled batches of what a file, a folder or a data set on the hub holds. An epoch is one pass.

    Args:
        path, files, revision: see `find_files`.
        reader: what the files hold.
        limit: makes the limit on the length of every text; called when the data is prepared.
        cache_dir: where prepared data is kept.
        batch_size: B.
        group_by_source: every batch comes from one source, so that its texts are harder to tell apart.
        val_fraction: share of the records that is not trained on, chosen by `seed`; at least one record.
        on_bad_record: what a malformed record does, after all of them have been found: `stop` the run, or `skip` it.
        num_proc: processes that prepare; None for one a core.
        seed: of the order and of what is held out.
    """

    def __init__(
        self,
        path: str,
        files: Sequence[str],
        reader: Reader,
        limit: Callable[[], PromptLimit],
        cache_dir: str,
        batch_size: int = 32,
        group_by_source: bool = False,
        val_fraction: float = 0.01,
        on_bad_record: Literal["stop", "skip"] = "stop",
        num_proc: int | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"datamodule.val_fraction={val_fraction}: it is a share between 0 and 1")
        if on_bad_record not in ("stop", "skip"):
            raise ValueError(f"datamodule.on_bad_record={on_bad_record!r}: it is stop or skip")
        for name, value in (("batch_size", batch_size), ("num_proc", 1 if num_proc is None else num_proc)):
            if value < 1:
                raise ValueError(f"datamodule.{name}={value}: it must be at least 1")
        self.path, self.files, self.revision, self.reader, self.limit = str(path), list(files), revision, reader, limit
        self.cache_dir, self.num_proc, self.on_bad_record = cache_dir, num_proc, on_bad_record
        self.batch_size, self.group_by_source, self.val_fraction, self.seed = batch_size, group_by_source, val_fraction, seed
        self._prepared: PreparedTriplets | None = None
        self.report = Report()

    def prepare_data(self) -> None:
        """Finds, checks and filters the records, or finds that this was done before; what came of it stands in `report`.

        Raises:
            FileNotFoundError: no such data, or no such tokenizer.
            ValueError: malformed records, each named by file and line, where they are to stop the run; no records.
        """
        self._prepared = self._open()

    def _open(self) -> PreparedTriplets:
        found = find_files(self.path, self.files, self.revision)
        limit = self.limit()
        folder = prepare(found, self.reader, limit, self.cache_dir, self.num_proc)
        self.report = load_report(folder)
        self._judge(self.report, limit.max_prompt_tokens)
        return PreparedTriplets(folder)

    def _judge(self, report: Report, max_prompt_tokens: int) -> None:
        counts = (
            f"{self.path}: {report.records:,} records, of which {report.kept:,} can be used, {report.too_long:,} have a text whose prompt "
            f"is longer than module.max_prompt_tokens={max_prompt_tokens}, and {report.bad:,} are malformed"
        )
        if report.bad and self.on_bad_record == "stop":
            raise ValueError(f"{counts}:\n{report.bad_lines()}\nmend them, or leave them out with datamodule.on_bad_record=skip")
        if not report.kept:
            raise ValueError(f"{counts}: there is nothing to train on")
        log.info(counts)
        if report.bad:
            log.warning("%s malformed records are left out:\n%s", f"{report.bad:,}", report.bad_lines())

    @property
    def prepared(self) -> PreparedTriplets:
        """All records that can be used."""
        if self._prepared is None:  # Lightning prepares in one process of a machine, and the others find what it made
            self._prepared = self._open()
        return self._prepared

    def split(self) -> tuple[Places, Places]:
        """Where the records to train on are, and those held out."""
        return held_out(len(self.prepared), self.val_fraction, self.seed)

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        train, _ = self.split()
        groups = self.prepared.by_source(train) if self.group_by_source else [train]
        small = [len(group) for group in groups if len(group) < self.batch_size]
        if small and len(small) < len(groups):
            log.warning(
                "%d sources have fewer records than a batch of %d and are never trained on, %s records in all: datamodule.group_by_source "
                "makes each batch of one source",
                *(len(small), self.batch_size, f"{sum(small):,}"),
            )
        stream = TripletBatches(self.prepared, groups, self.batch_size, self.seed, lambda: batches_done(self.trainer))
        return load(stream)

    def fixed_triplets(self, count: int) -> list[Triplet]:
        """Held-out records, the same at every call; fewer than `count` where fewer are held out."""
        return self.prepared.triplets(self.split()[1][:count])
