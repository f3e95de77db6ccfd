"""MTEB tasks in everyday English that need no hub: WordNet's glosses, chosen by `experiments/everyday_english`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from src.evaluation.tasks.made_tasks import Row, Set, TaskSpec, make_tasks, one_answer_set

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

SIZES = {"mini": True, "small": True, "large": False}
"""By size, True if it has only the rows marked as small. The names are those of the docstring tasks."""

_FINDS = "Finds the gloss of a word, given alone or in a sentence, among those of its other senses and of its neighbours."
_ORDERS = "Orders pairs of nouns' glosses by how near the nouns are in WordNet's hierarchy."
_CLASSES = "Tells to which lexicographer file (animals, food, verbs of motion, ...) a gloss belongs."
_PAIRS = "Tells whether a gloss is that of a word, or of its other sense or its neighbour."
SPECS = [
    TaskSpec("WordNetRetrieval", "Retrieval", "ndcg_at_10", _FINDS),
    TaskSpec("WordNetSimilarity", "STS", "cosine_spearman", _ORDERS, {"min_score": 0, "max_score": 1}),
    TaskSpec("WordNetClassification", "Classification", "accuracy", _CLASSES, {"n_experiments": 5}),  # as for docstrings
    TaskSpec("WordNetPairs", "PairClassification", "cosine_ap", _PAIRS),
]
"""The tasks in the order in which they are run."""

_LICENCE = "https://wordnet.princeton.edu/license-and-commercial-use"


def wordnet_tasks(folder: Path | str, size: str = "small", load: bool = True) -> list["AbsTask"]:
    """Returns four MTEB tasks: retrieval, whose queries and documents are the texts of all of them, graded similarity,
    classification and pair classification. Random states stay as they were.

    Args:
        folder: with documents.jsonl, queries.jsonl and pairs.jsonl.
        size: `small` (or `mini`, the same), or `large`, which includes the small one.
        load: make the data now.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"everyday tasks of size {size!r} do not exist; sizes are {', '.join(SIZES)}")
    return make_tasks(SPECS, wordnet_sets(read_rows(Path(folder), size)), load, domains=["Written"], license=_LICENCE)


def read_rows(folder: Path, size: str) -> dict[str, list[Row]]:
    """Returns the documents, queries and pairs of a size.

    Raises:
        FileNotFoundError: the folder lacks a file.
    """
    rows: dict[str, list[Row]] = {}
    for name in ("documents", "queries", "pairs"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [row for row in map(json.loads, lines) if row["small"] or not SIZES[size]]
    return rows


def wordnet_sets(rows: Mapping[str, list[Row]]) -> dict[str, Set]:
    """Returns the sets by task type."""
    documents, queries = rows["documents"], rows["queries"]
    texts = {doc["id"]: doc["text"] for doc in documents}
    numbers = {name: number for number, name in enumerate(sorted({doc["class"] for doc in documents}))}
    labelled = [(doc["split"], {"text": doc["text"], "label": numbers[doc["class"]]}) for doc in documents]
    pairs = [
        {"sentence1": query["text"], "sentence2": texts[query[document]], "labels": label}
        for query in queries
        for document, label in (("answer", 1), ("rival", 0))
    ]
    graded = [{"sentence1": texts[pair["one"]], "sentence2": texts[pair["other"]], "score": pair["similarity"]} for pair in rows["pairs"]]
    return {
        "Retrieval": one_answer_set(texts.items(), ((query["text"], query["answer"]) for query in queries)),
        "STS": {"test": graded},
        "Classification": {split: [row for own, row in labelled if own == split] for split in ("train", "test")},
        "PairClassification": {"test": pairs},
    }
