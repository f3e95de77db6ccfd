"""MTEB tasks that need no hub, made of docstrings of installed packages.

One choice of queries (summaries) and documents (bodies) serves all of them, so that each text is embedded once.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from src.datamodules.docstrings import Docstring, collect
from src.evaluation.tasks.made_tasks import Row, Set, TaskSpec, make_tasks, one_answer_set

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

_WORD = re.compile(r"[a-z]{4,}")
_MAX_OVERLAP = 0.75  # of a query's words with its document; above it, matching words finds the document
_MIN_SIBLINGS = 4  # docstrings of a module, so that every query has near misses


@dataclass(frozen=True)
class OfflineSize:
    """Numbers of texts.

    Attributes:
        documents: of the corpus.
        queries: each with one document that answers it.
        per_module: most documents of one module.
        candidates: documents to rerank for a query, including the right one.
        per_label: fewest documents of a subpackage that is a label in classification; half as many queries in clustering.
    """

    documents: int
    queries: int
    per_module: int
    candidates: int
    per_label: int


SIZES = {
    "mini": OfflineSize(documents=200, queries=80, per_module=6, candidates=10, per_label=10),  # while training, if texts are expensive
    "small": OfflineSize(documents=400, queries=150, per_module=6, candidates=10, per_label=10),  # while training
    "large": OfflineSize(documents=1000, queries=400, per_module=8, candidates=20, per_label=12),  # after training
}


def offline_tasks(
    packages: Sequence[str], cache_dir: Path | str, size: str | OfflineSize = "small", seed: int = 0, load: bool = True
) -> list["AbsTask"]:
    """Returns five MTEB tasks: retrieval, whose queries and documents are the texts of all of them, reranking, classification,
    clustering and pair classification. Random states stay as they were.

    Args:
        packages, cache_dir: see `collect`.
        size: `mini`, `small`, `large` or an OfflineSize.
        seed: of the choice of texts.
        load: make the data now.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: there is no such size, or too few docstrings for it.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"offline tasks of size {size!r} do not exist; sizes are {', '.join(SIZES)}")
        size = SIZES[size]
    sets = offline_sets(packages, cache_dir, size, seed)
    return make_tasks(_specs(size), sets, load, domains=["Programming", "Written"], license="not specified")


def _specs(size: OfflineSize) -> list[TaskSpec]:
    clustering = {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": size.queries}  # all, not 4 % of them
    from_where = "Tells from which subpackage the body of a docstring comes."
    return [
        TaskSpec("DocstringRetrieval", "Retrieval", "ndcg_at_10", "Finds the body of a docstring by its summary."),
        TaskSpec("DocstringReranking", "Reranking", "map_at_1000", "Orders bodies of the same module and subpackage by a summary."),
        # half of MTEB's experiments: fits take most of the time
        TaskSpec("DocstringClassification", "Classification", "accuracy", from_where, {"n_experiments": 5}),
        TaskSpec("DocstringClustering", "Clustering", "v_measure", "Groups summaries of docstrings by subpackage.", clustering),
        # cosine: the similarity of the rewards; max_ap is the best of five
        TaskSpec("DocstringPairs", "PairClassification", "cosine_ap", "Tells whether a summary and a body of one module belong together."),
    ]


def offline_sets(packages: Sequence[str], cache_dir: Path | str, size: OfflineSize, seed: int = 0) -> dict[str, Set]:
    """Returns the sets by task type; arguments and errors as for `offline_tasks`."""
    chosen = choose(collect(packages, cache_dir), size, seed)
    rng = random.Random(seed)
    search = one_answer_set(((doc.id, doc.body) for doc in chosen.documents), ((doc.summary, doc.id) for doc in chosen.queries))
    return {
        "Retrieval": search,
        "Reranking": {**search, "top_ranked": candidates(chosen, size.candidates, rng)},
        "Classification": classification_rows(chosen, size.per_label, rng),
        "Clustering": clustering_rows(chosen, size.per_label // 2),
        "PairClassification": pair_rows(chosen, rng),
    }


class Chosen(NamedTuple):
    """The docstrings of a corpus, and those of them whose summaries are queries."""

    documents: list[Docstring]
    queries: list[Docstring]


def choose(docs: Sequence[Docstring], size: OfflineSize, seed: int) -> Chosen:
    """Chooses documents module by module, and queries among them that do not share most of their words with their answer.

    Raises:
        ValueError: there are too few docstrings for the size.
    """
    by_module: dict[str, list[Docstring]] = {}
    for doc in docs:
        by_module.setdefault(doc.module, []).append(doc)
    rng = random.Random(seed)
    modules = [name for name in sorted(by_module) if len(by_module[name]) >= _MIN_SIBLINGS]
    rng.shuffle(modules)
    documents = [doc for name in modules for doc in rng.sample(by_module[name], min(size.per_module, len(by_module[name])))]
    documents = documents[: size.documents]
    askable = [doc for doc in documents if overlap(doc) <= _MAX_OVERLAP]
    if len(documents) < size.documents or len(askable) < size.queries:
        raise ValueError(
            f"the packages give {len(documents)} documents and {len(askable)} queries, but the offline tasks need {size.documents} and "
            f"{size.queries}: name more packages or a smaller size"
        )
    return Chosen(documents, rng.sample(askable, size.queries))


def overlap(doc: Docstring) -> float:
    """Returns the share of the summary's words (of four letters or more) that are in its body; 1 if it has no such word."""
    words = set(_WORD.findall(doc.summary.lower()))
    return len(words & set(_WORD.findall(doc.body.lower()))) / len(words) if words else 1.0


def subpackage(doc: Docstring) -> str:
    """Returns the first two parts of the module: `scipy.linalg` of `scipy.linalg._decomp_qr`."""
    return ".".join(doc.module.split(".")[:2])


def candidates(chosen: Chosen, count: int, rng: random.Random) -> dict[str, list[str]]:
    """Returns by query the ids of its answer and of the nearest other documents: of its module, its subpackage, its package."""
    found = {}
    for query in chosen.queries:
        others = [doc for doc in chosen.documents if doc.id != query.id]
        rng.shuffle(others)
        others.sort(key=partial(_distance, query))
        ids = [query.id, *(doc.id for doc in others[: count - 1])]
        rng.shuffle(ids)  # an encoder that gives equal scores must not win by the order
        found[f"q:{query.id}"] = ids
    return found


def _distance(query: Docstring, doc: Docstring) -> tuple[bool, bool, bool]:
    return doc.module != query.module, subpackage(doc) != subpackage(query), doc.package != query.package


def labels_of(docs: Iterable[Docstring], least: int) -> dict[str, int]:
    """Numbers the subpackages that at least `least` docstrings come from.

    Raises:
        ValueError: there are fewer than two.
    """
    counts = Counter(subpackage(doc) for doc in docs)
    names = sorted(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise ValueError(f"{len(names)} subpackages have {least} texts or more, and labels need two: name larger packages or a larger size")
    return {name: i for i, name in enumerate(names)}


def classification_rows(chosen: Chosen, least: int, rng: random.Random) -> dict[str, list[Row]]:
    """Returns bodies labelled by subpackage; half of each label's to train on, half to test on."""
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for name, number in labels_of(chosen.documents, least).items():
        texts = [doc.body for doc in chosen.documents if subpackage(doc) == name]
        rng.shuffle(texts)
        for split, part in (("train", texts[::2]), ("test", texts[1::2])):
            rows[split] += [{"text": text, "label": number} for text in part]
    return rows


def clustering_rows(chosen: Chosen, least: int) -> dict[str, list[Row]]:
    """Returns summaries labelled by subpackage."""
    numbers = labels_of(chosen.queries, least)
    labelled = [(doc.summary, numbers[subpackage(doc)]) for doc in chosen.queries if subpackage(doc) in numbers]
    return {"test": [{"sentences": text, "labels": label} for text, label in labelled]}


def pair_rows(chosen: Chosen, rng: random.Random) -> dict[str, list[Row]]:
    """Returns each summary with its own body (label 1), and with another body of its module (0)."""
    rows = []
    for query in chosen.queries:
        siblings = [doc for doc in chosen.documents if doc.module == query.module and doc.id != query.id]
        rows.append({"sentence1": query.summary, "sentence2": query.body, "labels": 1})
        if siblings:
            rows.append({"sentence1": query.summary, "sentence2": rng.choice(siblings).body, "labels": 0})
    return {"test": rows}
