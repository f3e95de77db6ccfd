"""MTEB tasks made of rows in memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

Row = dict[str, Any]
Set = Mapping[str, Any]
"""Rows by split; of a search task `search_set`."""


@dataclass(frozen=True)
class TaskSpec:
    """The description of a task for MTEB.

    Attributes:
        name: of the task.
        kind: MTEB's task type, which decides on the class.
        main_score: one of the scores of the type.
        description: one line.
        attributes: of the class, where they differ from MTEB's.
    """

    name: str
    kind: str
    main_score: str
    description: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


def search_set(
    corpus: list[Row], queries: list[Row], relevant: Mapping[str, dict[str, int]], ranked: Mapping[str, list[str]] | None = None
) -> Set:
    """Returns the set of a retrieval or reranking task.

    Args:
        corpus: id, title and text of each document.
        queries: id and text of each.
        relevant: grade of each relevant document, by query.
        ranked: ids of the documents to rank, by query; None: all.
    """
    return {
        "corpus": corpus,
        "queries": queries,
        "relevant_docs": {row["id"]: relevant[row["id"]] for row in queries},
        "top_ranked": ranked,
    }


def one_answer_set(documents: Iterable[tuple[str, str]], queries: Iterable[tuple[str, str]]) -> Set:
    """Returns the set of a retrieval task from (id, text) of documents and (text, id of its one answer) of queries."""
    rows = [{"id": f"q:{answer}", "text": text} for text, answer in queries]
    corpus = [{"id": id, "title": "", "text": text} for id, text in documents]
    return search_set(corpus, rows, {row["id"]: {row["id"].removeprefix("q:"): 1} for row in rows})


def make_tasks(specs: Iterable[TaskSpec], sets: Mapping[str, Set], load: bool, **metadata: Any) -> list["AbsTask"]:
    """Returns English tasks. Random states stay as they were, though MTEB seeds them.

    MTEB stores results under the revision of the data, which is a digest of all sets.

    Args:
        sets: by task type.
        load: make the data now.
        metadata: of all of them, as MTEB's TaskMetadata names it.
    """
    metadata |= {"annotations_creators": "derived", "sample_creation": "found"}
    revision = hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:16]
    tasks = []
    with isolate_rng():
        for spec in specs:
            dataset = {"path": f"memory/{spec.name}", "revision": revision}
            of_task: dict[str, Any] = {"description": spec.description, "main_score": spec.main_score, "dataset": dataset}
            tasks.append(make_task(spec.name, spec.kind, partial(dict, sets[spec.kind]), spec.attributes, **of_task, **metadata))
            if load:
                tasks[-1].load_data()
    return tasks


def make_task(
    name: str, kind: str, make_set: Callable[[], Set], members: Mapping[str, Any], language: str = "eng-Latn", **metadata: Any
) -> "AbsTask":
    """Returns a task of a new class below MTEB's class for the type.

    Args:
        make_set: returns the data; called when MTEB loads it.
        members: of the new class.
        metadata: as MTEB's TaskMetadata names it.
    """
    import mteb.abstasks
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.task_metadata import TaskMetadata

    def load_data(self: "AbsTask", num_proc: int | None = None, **kwargs: Any) -> None:
        if self.data_loaded:
            return
        made = {part: Dataset.from_list(rows) if isinstance(rows, list) else rows for part, rows in make_set().items()}
        self.dataset = {"default": {"test": made}} if "corpus" in made else DatasetDict(made)
        self.data_loaded = True

    category = "t2c" if kind in ("Classification", "Clustering") else "t2t"
    metadata |= {"name": name, "type": kind, "category": category, "eval_splits": ["test"], "eval_langs": [language]}
    base = getattr(mteb.abstasks, "AbsTaskRetrieval" if kind == "Reranking" else f"AbsTask{kind}")
    task: AbsTask = type(name, (base,), {"metadata": TaskMetadata(**metadata), "load_data": load_data, **members})()
    return task
