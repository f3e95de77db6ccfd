"""MTEB tasks in everyday English that need no hub: WordNet's glosses, which `experiments/everyday_english` chose and describes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from src.evaluation.tasks.task_folders import Row, TaskSpec, make_tasks, write_sets

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

SIZES = {"mini": True, "small": True, "large": False}
"""Whether a size is the rows that are marked as small, or all. The names are those of the docstring tasks: nothing is below small."""

DESCRIPTIONS = {
    "WordNetRetrieval": "Finds the gloss of a word, given alone or in a sentence, among those of its other senses and of its neighbours.",
    "WordNetSimilarity": "Orders pairs of nouns' glosses by how near the nouns are in WordNet's hierarchy.",
    "WordNetClassification": "Tells to which lexicographer file (animals, food, verbs of motion, ...) a gloss belongs.",
    "WordNetPairs": "Tells whether a gloss is that of a word, or of its other sense or its neighbour.",
}
"""Name and purpose of each task, in the order in which they are run."""

_LICENCE = "https://wordnet.princeton.edu/license-and-commercial-use"


def wordnet_tasks(folder: Path | str, cache_dir: Path | str, size: str = "small", load: bool = True) -> list["AbsTask"]:
    """Four MTEB tasks on WordNet's glosses: retrieval, graded similarity, classification, pairs.

    Every text is a query or a document of the retrieval task. Random states are left as they were.

    Args:
        folder: with documents.jsonl, queries.jsonl and pairs.jsonl.
        cache_dir: where the sets are kept as MTEB reads them.
        size: `small` or `large`, of which the small is a part; `mini` is the small one.
        load: reads their data now, so that evaluating them again and again reads no file; else MTEB does when it needs it.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: no such size.
    """
    if size not in SIZES:
        raise ValueError(f"everyday tasks of size {size!r} do not exist; sizes are {', '.join(SIZES)}")
    folders = write_sets("everyday", wordnet_sets(read_rows(Path(folder), size)), cache_dir)
    return make_tasks(_specs(), folders, ["Written"], _LICENCE, load)


def _specs() -> list[TaskSpec]:
    return [
        TaskSpec("WordNetRetrieval", "Retrieval", "retrieval", "ndcg_at_10", DESCRIPTIONS["WordNetRetrieval"]),
        TaskSpec(
            *("WordNetSimilarity", "STS", "similarity", "cosine_spearman", DESCRIPTIONS["WordNetSimilarity"]),
            {"min_score": 0, "max_score": 1},
        ),
        TaskSpec(
            *("WordNetClassification", "Classification", "classification", "accuracy", DESCRIPTIONS["WordNetClassification"]),
            {"n_experiments": 5},  # as many as for docstrings
        ),
        TaskSpec("WordNetPairs", "PairClassification", "pairs", "cosine_ap", DESCRIPTIONS["WordNetPairs"]),
    ]


def read_rows(folder: Path, size: str) -> dict[str, list[Row]]:
    """Rows of documents, queries and pairs that belong to a size.

    Raises:
        FileNotFoundError: one of the files is not there.
    """
    rows: dict[str, list[Row]] = {}
    for name in ("documents", "queries", "pairs"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [row for row in map(json.loads, lines) if row["small"] or not SIZES[size]]
    return rows


def wordnet_sets(rows: Mapping[str, list[Row]]) -> dict[str, dict[str, list[Row]]]:
    """The rows of each task's set, by split or part."""
    texts = {doc["id"]: doc["text"] for doc in rows["documents"]}
    return {
        "retrieval": retrieval_rows(rows),
        "similarity": {
            "test": [
                {"sentence1": texts[pair["one"]], "sentence2": texts[pair["other"]], "score": pair["similarity"]} for pair in rows["pairs"]
            ]
        },
        "classification": classification_rows(rows["documents"]),
        "pairs": {
            "test": [
                {"sentence1": query["text"], "sentence2": texts[query[side]], "labels": label}
                for query in rows["queries"]
                for side, label in (("answer", 1), ("rival", 0))
            ]
        },
    }


def retrieval_rows(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Corpus, queries and relevance: a word asks, the gloss of the meant sense answers."""
    asked = [(f"q:{query['answer']}", query) for query in rows["queries"]]
    return {
        "corpus": [{"_id": doc["id"], "title": "", "text": doc["text"]} for doc in rows["documents"]],
        "queries": [{"_id": id, "text": query["text"]} for id, query in asked],
        "default": [{"query-id": id, "corpus-id": query["answer"], "score": 1} for id, query in asked],
    }


def classification_rows(documents: list[Row]) -> dict[str, list[Row]]:
    """Glosses and the numbers of their classes, in the splits that they were given."""
    numbers = {name: number for number, name in enumerate(sorted({doc["class"] for doc in documents}))}
    return {
        split: [{"text": doc["text"], "label": numbers[doc["class"]]} for doc in documents if doc["split"] == split]
        for split in ("train", "test")
    }
