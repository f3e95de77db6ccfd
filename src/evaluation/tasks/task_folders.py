"""Evaluation sets as data set folders, and MTEB tasks made of them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.seed import isolate_rng

from src.utils.atomic import make_folder_once
from src.utils.quiet import quiet_mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

Row = dict[str, Any]
Set = Mapping[str, list[Row]]
"""Rows by split; of a search task by part: corpus, queries, default (relevance) and, to rerank, top_ranked."""


@dataclass(frozen=True)
class TaskSpec:
    """What MTEB needs to know of a task.

    Attributes:
        name: of the task.
        kind: MTEB's task type, which decides on the class.
        data: name of its set in `write_sets`.
        main_score: one of the scores of the type.
        description: one line.
        attributes: of the class, where they differ from MTEB's.
    """

    name: str
    kind: str
    data: str
    main_score: str
    description: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


def search_set(documents: Iterable[tuple[str, str]], queries: Iterable[tuple[str, str]]) -> dict[str, list[Row]]:
    """Returns the set of a retrieval task from (id, text) of documents and (text, id of its one answer) of queries."""
    rows = [(f"q:{answer}", text, answer) for text, answer in queries]
    return {
        "corpus": [{"_id": id, "title": "", "text": text} for id, text in documents],
        "queries": [{"_id": id, "text": text} for id, text, _ in rows],
        "default": [{"query-id": id, "corpus-id": answer, "score": 1} for id, _, answer in rows],
    }


def write_sets(name: str, sets: Mapping[str, Set], cache_dir: Path | str) -> dict[str, Path]:
    """Returns the folder of each set; writes all of them if that was not done before.

    Folder names end in a digest of the content: `datasets` caches what it reads under the name of a folder, not its path,
    and MTEB stores results under the revision of the data, so different sets must not share a name.

    Args:
        name: beginning of the name of the folder in `cache_dir` with all of them.
    """
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:16]
    folder = Path(cache_dir).absolute() / f"{name}_{digest}"

    def write(partial: Path) -> None:
        for part, rows in sets.items():
            _write_folder(partial / f"{part}_{digest}", rows)

    make_folder_once(folder, write)
    return {part: folder / f"{part}_{digest}" for part in sets}


def _write_folder(folder: Path, rows: Set) -> None:
    """Writes JSON lines, and a README.md whose header tells `datasets` the splits of one config, or for search tasks the configs."""
    folder.mkdir()
    by_config = "corpus" in rows
    header = ["---", "configs:"] + ([] if by_config else ["- config_name: default", "  data_files:"])
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
        header += [f"- config_name: {name}", "  data_files:"] if by_config else []
        header += [f"  - split: {'test' if by_config else name}", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]), encoding="utf-8")


def make_tasks(specs: Iterable[TaskSpec], folders: Mapping[str, Path], load: bool, **metadata: Any) -> list["AbsTask"]:
    """Returns English tasks on sets that `write_sets` wrote. Random states stay as they were, though MTEB seeds them.

    Args:
        folders: by the name of the set.
        load: read the data now, so that repeated evaluation reads no file.
        metadata: of all of them, as MTEB's TaskMetadata names it.
    """
    metadata |= {"annotations_creators": "derived", "sample_creation": "found"}
    tasks = []
    with isolate_rng(), quiet_mteb():
        for spec in specs:
            folder = folders[spec.data]
            dataset = {"path": str(folder), "revision": folder.name.rpartition("_")[2]}
            of_task: dict[str, Any] = {"description": spec.description, "main_score": spec.main_score, "dataset": dataset}
            tasks.append(make_task(spec.name, spec.kind, spec.attributes, **of_task, **metadata))
            if load:
                tasks[-1].load_data()
    return tasks


def make_task(name: str, kind: str, members: Mapping[str, Any], language: str = "eng-Latn", **metadata: Any) -> "AbsTask":
    """Returns a task of a new class below MTEB's class for the type.

    Args:
        members: of the new class.
        metadata: as MTEB's TaskMetadata names it.
    """
    import mteb.abstasks
    from mteb.abstasks.task_metadata import TaskMetadata

    category = "t2c" if kind in ("Classification", "Clustering") else "t2t"
    metadata |= {"name": name, "type": kind, "category": category, "eval_splits": ["test"], "eval_langs": [language]}
    base = getattr(mteb.abstasks, "AbsTaskRetrieval" if kind == "Reranking" else f"AbsTask{kind}")
    task: AbsTask = type(name, (base,), {"metadata": TaskMetadata(**metadata), **members})()
    return task
