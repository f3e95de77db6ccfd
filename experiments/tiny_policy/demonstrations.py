"""Demonstrations for the cold start: pairs of texts, each with a rationale of terms and a summary."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from src.datamodules.docstrings import Docstring, collect, cut_between_words
from src.datamodules.streams import batches_done, grouped_batches, require_one_batch, stream_loader

_CONTROL = re.compile(r"<\||think>")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")


@dataclass(frozen=True)
class Demonstration:
    """A query and its document, each with a rationale."""

    query: str
    document: str
    query_rationale: str
    document_rationale: str


def inverse_document_frequency(docstrings: Sequence[Docstring]) -> dict[str, float]:
    """Returns log(n / n_w) of every lower-cased word in n docstrings, n_w of which contain it."""
    counts = Counter(word for doc in docstrings for word in {w.lower() for w in _WORD.findall(f"{doc.summary} {doc.body}")})
    return {word: math.log(len(docstrings) / count) for word, count in counts.items()}


def draw_terms(text: str, idf: dict[str, float], count: int, rng: random.Random) -> list[str]:
    """Returns up to `count` words of a text in their order, drawn without replacement in proportion to exp(0.7 idf).

    The draw is Gumbel-top-k, so that rationales vary and rewards have a choice to make.
    """
    first: dict[str, str] = {}
    for word in _WORD.findall(text):
        first.setdefault(word.lower(), word)
    known = [word for word in first if idf.get(word, 0.0) > 2.0]  # the rest are function words
    keyed = {word: 0.7 * idf[word] - math.log(rng.expovariate(1.0) + 1e-12) for word in known}
    chosen = set(sorted(known, key=keyed.__getitem__, reverse=True)[:count])
    return [first[word] for word in first if word in chosen]


def write_rationale(terms: Sequence[str], summary: str) -> str:
    """Returns a rationale in the tiny policy's form: terms, then a summary."""
    return f"<think> {', '.join(terms)}</think> {summary}"


class DemonstrationStream(IterableDataset[list[Demonstration]]):
    """Endless batches of `modules_per_batch` modules with `docstrings_per_module` docstrings each, so that many are hard negatives.

    `done` returns the number of batches to skip, at every start.
    """

    def __init__(
        self,
        docstrings: Sequence[Docstring],
        modules_per_batch: int,
        docstrings_per_module: int,
        terms: int,
        max_text_chars: int,
        seed: int,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.done = done
        self.idf = inverse_document_frequency(docstrings)
        self.modules_per_batch, self.docstrings_per_module, self.terms, self.max_text_chars, self.seed = (
            modules_per_batch,
            docstrings_per_module,
            terms,
            max_text_chars,
            seed,
        )
        # a control token quoted in a summary would become one in the rationale
        self.docstrings = [doc for doc in docstrings if not _CONTROL.search(doc.summary)]
        require_one_batch(len(self.docstrings), modules_per_batch, docstrings_per_module)

    def demonstrate(self, doc: Docstring, rng: random.Random) -> Demonstration:
        """Returns a demonstration of one docstring; its terms come from the part that the model sees."""
        body = cut_between_words(doc.body, self.max_text_chars)
        return Demonstration(
            query=doc.summary,
            document=body,
            query_rationale=write_rationale(draw_terms(doc.summary, self.idf, self.terms, rng), doc.summary),
            document_rationale=write_rationale(draw_terms(body, self.idf, self.terms, rng), doc.summary),
        )

    def __iter__(self) -> Iterator[list[Demonstration]]:
        return islice(self._batches(), self.done(), None)

    def _batches(self) -> Iterator[list[Demonstration]]:
        rng = random.Random(self.seed)
        while True:
            for docs in grouped_batches(self.docstrings, lambda doc: doc.module, self.modules_per_batch, self.docstrings_per_module, rng):
                yield [self.demonstrate(doc, rng) for doc in docs]


class DemonstrationDataModule(L.LightningDataModule):
    """Serves batches of demonstrations from docstrings; validates on other packages.

    Args:
        train_packages, val_packages: names as in `collect`.
        cache_dir: folder of the parsed docstrings.
        modules_per_batch, docstrings_per_module: of a batch.
        terms: most terms in a rationale.
        max_text_chars: a document is cut here, between words, before its terms are drawn.
        val_batches: batches of one validation.
        seed: of the order and of the terms.
    """

    def __init__(
        self,
        train_packages: Sequence[str],
        val_packages: Sequence[str],
        cache_dir: str,
        modules_per_batch: int = 16,
        docstrings_per_module: int = 4,
        terms: int = 6,
        max_text_chars: int = 320,
        val_batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_packages, self.val_packages, self.cache_dir = list(train_packages), list(val_packages), cache_dir
        self.stream: dict[str, Any] = {
            "modules_per_batch": modules_per_batch,
            "docstrings_per_module": docstrings_per_module,
            "terms": terms,
            "max_text_chars": max_text_chars,
        }
        self.val_batches, self.seed = val_batches, seed

    def train_dataloader(self) -> DataLoader[list[Demonstration]]:
        docs = collect(self.train_packages, self.cache_dir)
        return stream_loader(DemonstrationStream(docs, **self.stream, seed=self.seed, done=lambda: batches_done(self.trainer)))

    def val_dataloader(self) -> DataLoader[list[Demonstration]]:
        docs = collect(self.val_packages, self.cache_dir)
        stream = iter(DemonstrationStream(docs, **self.stream, seed=1))
        return DataLoader([next(stream) for _ in range(self.val_batches)], batch_size=None)  # type: ignore[arg-type]
