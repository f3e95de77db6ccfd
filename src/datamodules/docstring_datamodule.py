"""Triplets from the docstrings of installed packages: the data of the default experiment."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from src.datamodules.docstrings import Docstring, collect, cut_between_words, package_version, read_package
from src.datamodules.streams import batches_done, grouped_batches, require_one_batch, stream_loader
from src.records import Triplet
from src.utils.data_contents import DataContents


def make_triplets(docstrings: Sequence[Docstring], negatives: int, max_text_chars: int, rng: random.Random) -> list[Triplet]:
    """Returns triplets of a summary, its body, and the bodies of other docstrings of its module as hard negatives.

    A docstring whose module has fewer others than `negatives` is left out. Bodies are cut between words to at most
    `max_text_chars` characters.
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


@dataclass(eq=False)
class TripletStream(IterableDataset[list[Triplet]]):
    """Endless shuffled passes over triplets, in batches of `modules_per_batch` modules with `docstrings_per_module` each.

    Each iterator skips the batches that `done()` counts, so that a resumed run and the trainer's next epoch go on with new ones.
    """

    triplets: Sequence[Triplet]
    modules_per_batch: int
    docstrings_per_module: int
    seed: int
    done: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        require_one_batch(len(self.triplets), self.modules_per_batch, self.docstrings_per_module)

    def __iter__(self) -> Iterator[list[Triplet]]:
        return islice(self._batches(), self.done(), None)

    def _batches(self) -> Iterator[list[Triplet]]:
        rng = random.Random(self.seed)
        while True:
            yield from grouped_batches(self.triplets, lambda t: t.id.split(":")[0], self.modules_per_batch, self.docstrings_per_module, rng)


class DocstringDataModule(L.LightningDataModule):
    """Batches of docstring triplets, in endless shuffled passes.

    Args:
        train_packages: to train on.
        val_packages: for tables and diagnostics while training, and for choosing settings.
        test_packages: for final scores only; kept apart from the other two here.
        cache_dir: for parsed docstrings.
        modules_per_batch, docstrings_per_module: the batch size is their product.
        negatives: M, hard negatives of a triplet.
        max_text_chars: longest document, cut between words.
        seed: of the order and of the negatives.

    Raises:
        ValueError: two lists share a package.
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
        self.batch_size = modules_per_batch * docstrings_per_module
        self.negatives, self.max_text_chars, self.seed = negatives, max_text_chars, seed

    @property
    def description(self) -> str:
        """The data in words, for the model card."""
        return f"summaries and bodies of the docstrings of {', '.join(self.train_packages)}"

    def prepare_data(self) -> None:
        for packages in (self.train_packages, self.val_packages):
            collect(packages, self.cache_dir)

    def contents(self) -> DataContents:
        """Returns what the docstrings of the training packages are."""
        docs = collect(self.train_packages, self.cache_dir)
        digest = hashlib.sha256(json.dumps([(doc.id, doc.summary, doc.body) for doc in docs]).encode()).hexdigest()[:16]
        versions = ", ".join(f"{package} {package_version(package)}" for package in self.train_packages)
        usable = len(self.triplets(self.train_packages, self.seed))
        return DataContents("docstrings", f"docstrings of {versions}", digest, len(docs), usable)

    def triplets(self, packages: Sequence[str], seed: int) -> list[Triplet]:
        """Returns all triplets of some packages; `seed` draws the negatives."""
        return make_triplets(collect(packages, self.cache_dir), self.negatives, self.max_text_chars, random.Random(seed))

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        triplets, shape = self.triplets(self.train_packages, self.seed), (self.modules_per_batch, self.docstrings_per_module)
        return stream_loader(TripletStream(triplets, *shape, self.seed, lambda: batches_done(self.trainer)))

    def preview(self, count: int) -> list[Triplet]:
        """Returns the first triplets of the first packages that have some, parsed anew and not cached."""
        found: list[Triplet] = []
        for package in self.train_packages:
            docstrings = read_package(package, self.max_text_chars)
            found += make_triplets(docstrings, self.negatives, self.max_text_chars, random.Random(self.seed))
            if len(found) >= count:
                break
        return found[:count]

    def fixed_triplets(self, count: int) -> list[Triplet]:
        """Returns the same validation triplets at every call."""
        return random.Random(0).sample(self.triplets(self.val_packages, seed=0), count)
