"""Triplets from the docstrings of installed packages: the data of the default experiment."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from src.datamodules.docstrings import Docstring, collect, cut_between_words
from src.datamodules.grouping import grouped_batches, require_one_batch
from src.datamodules.loading import load
from src.records import Triplet


def make_triplets(docstrings: Sequence[Docstring], negatives: int, max_text_chars: int, rng: random.Random) -> list[Triplet]:
    """Summary, body, and the bodies of other docstrings of the same module as hard negatives.

    A docstring whose module has too few others gives no triplet. Bodies are cut at `max_text_chars`, between words.
    """
    by_module: dict[str, list[Docstring]] = {}
    for doc in docstrings:
        by_module.setdefault(doc.module, []).append(doc)
    triplets = []
    for doc in docstrings:
        others = [other for other in by_module[doc.module] if other.id != doc.id]
        if len(others) >= negatives:
            chosen = tuple(cut_between_words(other.body, max_text_chars) for other in rng.sample(others, negatives))
            triplets.append(Triplet(doc.id, doc.summary, cut_between_words(doc.body, max_text_chars), chosen, doc.package))
    return triplets


def batches_done(trainer: L.Trainer | None) -> int:
    """Batches that a trainer has trained on, before an interruption too; 0 where nothing trains."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed) if trainer else 0  # type: ignore[attr-defined]


class TripletStream(IterableDataset[list[Triplet]]):
    """Endless shuffled passes of batches of `modules_per_batch` modules with `docstrings_per_module` triplets each.

    `done` is asked at every start and says how many batches to leave out, so that neither a resumed run nor another of
    the trainer's epochs sees the first batches again.
    """

    def __init__(
        self,
        triplets: Sequence[Triplet],
        modules_per_batch: int,
        docstrings_per_module: int,
        seed: int,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        require_one_batch(len(triplets), modules_per_batch, docstrings_per_module)
        self.triplets, self.modules_per_batch, self.docstrings_per_module, self.seed, self.done = (
            list(triplets),
            modules_per_batch,
            docstrings_per_module,
            seed,
            done,
        )

    def __iter__(self) -> Iterator[list[Triplet]]:
        return islice(self._batches(), self.done(), None)

    def _batches(self) -> Iterator[list[Triplet]]:
        rng = random.Random(self.seed)
        while True:
            yield from grouped_batches(self.triplets, lambda t: t.id.split(":")[0], self.modules_per_batch, self.docstrings_per_module, rng)


class DocstringDataModule(L.LightningDataModule):
    """Triplets (summary, rest, another docstring of the module) of the packages that are not held out.

    Args:
        train_packages: trained on.
        val_packages: looked at while training runs, and what settings are chosen on.
        test_packages: scored at the end, and looked at for nothing else.
        cache_dir: where the parsed docstrings are kept.
        modules_per_batch, docstrings_per_module: a batch is `modules_per_batch` modules with `docstrings_per_module` triplets each.
        negatives: M hard negatives an instance.
        max_text_chars: longest document, cut between words.
        seed: of the order and of the negatives.
    """

    def __init__(
        self,
        train_packages: Sequence[str],
        val_packages: Sequence[str],
        test_packages: Sequence[str],
        cache_dir: str,
        modules_per_batch: int = 8,
        docstrings_per_module: int = 4,
        negatives: int = 1,
        max_text_chars: int = 320,
        seed: int = 0,
    ) -> None:
        super().__init__()
        held_out = set(val_packages) | set(test_packages)
        if held_out & set(train_packages) or set(val_packages) & set(test_packages):
            raise ValueError("datamodule: train_packages, val_packages and test_packages must not share a package")
        self.train_packages, self.val_packages, self.test_packages = list(train_packages), list(val_packages), list(test_packages)
        self.cache_dir, self.modules_per_batch, self.docstrings_per_module = cache_dir, modules_per_batch, docstrings_per_module
        self.negatives, self.max_text_chars, self.seed = negatives, max_text_chars, seed

    def prepare_data(self) -> None:
        for packages in (self.train_packages, self.val_packages):
            collect(packages, self.cache_dir)

    def triplets(self, packages: Sequence[str], seed: int) -> list[Triplet]:
        """All triplets of some packages; `seed` draws the negatives."""
        return make_triplets(collect(packages, self.cache_dir), self.negatives, self.max_text_chars, random.Random(seed))

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        stream = TripletStream(
            self.triplets(self.train_packages, self.seed),
            self.modules_per_batch,
            self.docstrings_per_module,
            self.seed,
            lambda: batches_done(self.trainer),
        )
        return load(stream)

    def fixed_triplets(self, count: int) -> list[Triplet]:
        """The same validation triplets at every call, for tables and diagnostics."""
        return random.Random(0).sample(self.triplets(self.val_packages, seed=0), count)
