"""Evaluation sets made of docstrings and written as dataset folders; `offline_tasks` makes MTEB tasks of them.

One choice of queries (summaries) and documents (bodies) serves every set, so that a text has to be embedded only once.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.datamodules.docstrings import Docstring, collect
from src.evaluation.tasks.task_folders import Row, write_sets

_WORD = re.compile(r"[a-z]{4,}")
_MOST_OVERLAP = 0.75  # of a query's words in its document; above it, matching words is enough to find it
_LEAST_SIBLINGS = 4  # docstrings of a module, so that every query meets near misses


@dataclass(frozen=True)
class OfflineSize:
    """How much is evaluated.

    Attributes:
        documents: of the corpus.
        queries: each with one document that answers it.
        per_module: most documents of one module.
        candidates: documents to rerank for a query, the right one among them.
        per_label: a subpackage with fewer documents (classification) or half as many queries (clustering) is no label.
    """

    documents: int
    queries: int
    per_module: int
    candidates: int
    per_label: int


SIZES = {
    "mini": OfflineSize(documents=200, queries=80, per_module=6, candidates=10, per_label=10),  # while training, where a text is dear
    "small": OfflineSize(documents=400, queries=150, per_module=6, candidates=10, per_label=10),  # while training
    "large": OfflineSize(documents=1000, queries=400, per_module=8, candidates=20, per_label=12),  # afterwards
}


@dataclass(frozen=True)
class Chosen:
    """The docstrings of a corpus, and those of them whose summaries are queries."""

    documents: list[Docstring]
    queries: list[Docstring]


def subpackage(doc: Docstring) -> str:
    """`scipy.linalg` of `scipy.linalg._decomp_qr`."""
    return ".".join(doc.module.split(".")[:2])


def overlap(doc: Docstring) -> float:
    """Share of the summary's words (of four letters or more) that its body has too; 1 where it has no such word."""
    words = set(_WORD.findall(doc.summary.lower()))
    return len(words & set(_WORD.findall(doc.body.lower()))) / len(words) if words else 1.0


def choose(docs: Sequence[Docstring], size: OfflineSize, seed: int) -> Chosen:
    """Whole modules' worth of documents, and queries among them that sharing words does not answer.

    Raises:
        ValueError: too few docstrings for the size.
    """
    by_module: dict[str, list[Docstring]] = {}
    for doc in docs:
        by_module.setdefault(doc.module, []).append(doc)
    rng = random.Random(seed)
    modules = [name for name in sorted(by_module) if len(by_module[name]) >= _LEAST_SIBLINGS]
    rng.shuffle(modules)
    documents = [doc for name in modules for doc in rng.sample(by_module[name], min(size.per_module, len(by_module[name])))]
    documents = documents[: size.documents]
    askable = [doc for doc in documents if overlap(doc) <= _MOST_OVERLAP]
    if len(documents) < size.documents or len(askable) < size.queries:
        raise ValueError(
            f"the packages give {len(documents)} documents and {len(askable)} queries, but the offline tasks ask for "
            f"{size.documents} and {size.queries}: name more packages or a smaller size"
        )
    return Chosen(documents, rng.sample(askable, size.queries))


def retrieval_rows(chosen: Chosen) -> dict[str, list[Row]]:
    """Corpus, queries and relevance: the summary asks, its body answers."""
    return {
        "corpus": [{"_id": doc.id, "title": "", "text": doc.body} for doc in chosen.documents],
        "queries": [{"_id": f"q:{doc.id}", "text": doc.summary} for doc in chosen.queries],
        "default": [{"query-id": f"q:{doc.id}", "corpus-id": doc.id, "score": 1} for doc in chosen.queries],
    }


def _apart(query: Docstring, doc: Docstring) -> tuple[bool, bool, bool]:
    return doc.module != query.module, subpackage(doc) != subpackage(query), doc.package != query.package


def reranking_rows(chosen: Chosen, count: int, rng: random.Random) -> dict[str, list[Row]]:
    """The same with candidates for every query, the nearest first: of its module, its subpackage, its package."""
    ranked = []
    for query in chosen.queries:
        others = [doc for doc in chosen.documents if doc.id != query.id]
        rng.shuffle(others)
        others.sort(key=partial(_apart, query))
        ids = [query.id, *(doc.id for doc in others[: count - 1])]
        rng.shuffle(ids)  # an encoder that ties everything must not win by order
        ranked.append({"query-id": f"q:{query.id}", "corpus-ids": ids})
    return retrieval_rows(chosen) | {"top_ranked": ranked}


def labels_of(docs: Iterable[Docstring], least: int) -> dict[str, int]:
    """Numbers of the subpackages that `least` docstrings or more come from.

    Raises:
        ValueError: fewer than two, between which there is nothing to tell.
    """
    counts = Counter(subpackage(doc) for doc in docs)
    names = sorted(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise ValueError(f"{len(names)} subpackages have {least} texts or more, and labels need two: name larger packages or a larger size")
    return {name: i for i, name in enumerate(names)}


def classification_rows(chosen: Chosen, least: int, rng: random.Random) -> dict[str, list[Row]]:
    """Which subpackage a document comes from; half of each subpackage's documents to train on, half to test on."""
    numbers = labels_of(chosen.documents, least)
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for name, number in numbers.items():
        texts = [doc.body for doc in chosen.documents if subpackage(doc) == name]
        rng.shuffle(texts)
        for split, part in (("train", texts[::2]), ("test", texts[1::2])):
            rows[split] += [{"text": text, "label": number} for text in part]
    return rows


def clustering_rows(chosen: Chosen, least: int) -> dict[str, list[Row]]:
    """Queries that should fall together by subpackage."""
    numbers = labels_of(chosen.queries, least)
    return {
        "test": [{"sentences": doc.summary, "labels": numbers[subpackage(doc)]} for doc in chosen.queries if subpackage(doc) in numbers]
    }


def pair_rows(chosen: Chosen, rng: random.Random) -> dict[str, list[Row]]:
    """A summary with its own body (1), and with another body of its module (0)."""
    rows = []
    for query in chosen.queries:
        siblings = [doc for doc in chosen.documents if doc.module == query.module and doc.id != query.id]
        rows.append({"sentence1": query.summary, "sentence2": query.body, "labels": 1})
        if siblings:
            rows.append({"sentence1": query.summary, "sentence2": rng.choice(siblings).body, "labels": 0})
    return {"test": rows}


def offline_sets(packages: Sequence[str], cache_dir: Path | str, size: OfflineSize, seed: int = 0) -> dict[str, Path]:
    """The folder of each set of some packages, written once.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: too few docstrings for the size, or too few subpackages to tell apart.
    """
    chosen = choose(collect(packages, cache_dir), size, seed)
    rng = random.Random(seed)
    sets = {
        "retrieval": retrieval_rows(chosen),
        "reranking": reranking_rows(chosen, size.candidates, rng),
        "classification": classification_rows(chosen, size.per_label, rng),
        "clustering": clustering_rows(chosen, size.per_label // 2),
        "pairs": pair_rows(chosen, rng),
    }
    return write_sets("offline", sets, cache_dir)
