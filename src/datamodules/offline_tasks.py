"""MTEB tasks that need no hub: the library's own task classes and evaluators on sets made of docstrings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.seed import isolate_rng

from src.datamodules.offline_sets import SIZES, OfflineSize, offline_sets
from src.utils.quiet import quiet_mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskType

DESCRIPTIONS = {
    "DocstringRetrieval": "Finds the body of a docstring by its summary.",
    "DocstringReranking": "Orders bodies of the same module and subpackage by a summary.",
    "DocstringClassification": "Tells from which subpackage the body of a docstring comes.",
    "DocstringClustering": "Groups summaries of docstrings by subpackage.",
    "DocstringPairs": "Tells whether a summary and a body of one module belong together.",
}
"""Name and purpose of each task, in the order in which they are run."""


def offline_tasks(
    packages: Sequence[str], cache_dir: Path | str, size: str | OfflineSize = "small", seed: int = 0, load: bool = True
) -> list["AbsTask"]:
    """Five MTEB tasks on the docstrings of `packages`: retrieval, reranking, classification, clustering, pairs.

    Every text is a query or a document of the
    retrieval task. Random states are left as they were (MTEB seeds them when a task is made).

    Args:
        packages: names as in `collect`.
        cache_dir: where the docstrings and the sets are kept.
        size: `small`, `large`, or one's own.
        seed: of the choice of texts.
        load: reads their data now, so that evaluating them again and again reads no file; else MTEB does when it needs it.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: no such size, or too few docstrings for it.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"offline tasks of size {size!r} do not exist; sizes are {', '.join(SIZES)}")
        size = SIZES[size]
    folders = offline_sets(packages, cache_dir, size, seed)
    with isolate_rng(), quiet_mteb():
        tasks = _tasks(folders, size)
        for task in tasks if load else []:
            task.load_data()
    return tasks


def _tasks(folders: dict[str, Path], size: OfflineSize) -> list["AbsTask"]:
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval

    def task(name: str, kind: "TaskType", data: str, base: type["AbsTask"], main_score: str, **attributes: Any) -> "AbsTask":
        metadata = _metadata(name, kind, folders[data], main_score)
        return type(name, (base,), {"metadata": metadata, **attributes})()

    return [
        task("DocstringRetrieval", "Retrieval", "retrieval", AbsTaskRetrieval, "ndcg_at_10"),
        task("DocstringReranking", "Reranking", "reranking", AbsTaskRetrieval, "map_at_1000"),
        task(
            *("DocstringClassification", "Classification", "classification", AbsTaskClassification, "accuracy"),
            n_experiments=5,  # fits take most of the time; half as many as MTEB's usual
        ),
        task(
            *("DocstringClustering", "Clustering", "clustering", AbsTaskClustering, "v_measure"),
            max_fraction_of_documents_to_embed=None,  # all of a small set, in place of 4%
            max_documents_per_cluster=size.queries,  # drawn with replacement for each of the 10 clusterings
        ),
        # the measure that the rewards use, not the best of five as in `max_ap`
        task("DocstringPairs", "PairClassification", "pairs", AbsTaskPairClassification, "cosine_ap"),
    ]


def _metadata(name: str, kind: "TaskType", data: Path, main_score: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description=DESCRIPTIONS[name],
        dataset={"path": str(data), "revision": data.name.rpartition("_")[2]},
        type=kind,
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        domains=["Programming", "Written"],
        annotations_creators="derived",
        sample_creation="found",
        license="not specified",
    )
