"""MTEB tasks that need no hub: the library's own task classes and evaluators on sets made of docstrings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.evaluation.tasks.offline_sets import SIZES, OfflineSize, offline_sets
from src.evaluation.tasks.task_folders import TaskSpec, make_tasks

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

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

    Every text is a query or a document of the retrieval task. Random states are left as they were (MTEB seeds them when a task is made).

    Args:
        packages: names as in `collect`.
        cache_dir: where the docstrings and the sets are kept.
        size: `mini`, `small`, `large`, or one's own.
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
    return make_tasks(_specs(size), folders, ["Programming", "Written"], "not specified", load)


def _specs(size: OfflineSize) -> list[TaskSpec]:
    return [
        TaskSpec("DocstringRetrieval", "Retrieval", "retrieval", "ndcg_at_10", DESCRIPTIONS["DocstringRetrieval"]),
        TaskSpec("DocstringReranking", "Reranking", "reranking", "map_at_1000", DESCRIPTIONS["DocstringReranking"]),
        TaskSpec(
            *("DocstringClassification", "Classification", "classification", "accuracy", DESCRIPTIONS["DocstringClassification"]),
            {"n_experiments": 5},  # fits take most of the time; half as many as MTEB's usual
        ),
        TaskSpec(
            *("DocstringClustering", "Clustering", "clustering", "v_measure", DESCRIPTIONS["DocstringClustering"]),
            {
                "max_fraction_of_documents_to_embed": None,  # all of a small set, in place of 4%
                "max_documents_per_cluster": size.queries,  # drawn with replacement for each of the 10 clusterings
            },
        ),
        # the measure that the rewards use, not the best of five as in `max_ap`
        TaskSpec("DocstringPairs", "PairClassification", "pairs", "cosine_ap", DESCRIPTIONS["DocstringPairs"]),
    ]
