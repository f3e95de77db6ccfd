"""Evaluation sets as dataset folders, and MTEB tasks on them that need no hub."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.seed import isolate_rng

from src.evaluation.tasks.own_tasks import KINDS
from src.utils.quiet import quiet_mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskDomain, TaskType

Row = dict[str, Any]


def write_sets(name: str, sets: Mapping[str, Mapping[str, list[Row]]], cache_dir: Path | str) -> dict[str, Path]:
    """The folder of each set, written once.

    Names end in a digest of the content: `datasets` keeps what it reads under the name of the folder and not its path,
    and MTEB keeps results under the revision of the data, so that sets that differ must not share a name.

    Args:
        name: that the folder of all of them begins with.
        sets: by name; a set is rows by split, or by part (corpus, queries, default, top_ranked).
        cache_dir: where the folder is made.
    """
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:16]
    folder = Path(cache_dir).absolute() / f"{name}_{digest}"
    if not folder.exists():
        _write_aside(folder, sets, digest)
    return {part: folder / f"{part}_{digest}" for part in sets}


def _write_aside(folder: Path, sets: Mapping[str, Mapping[str, list[Row]]], digest: str) -> None:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")  # written aside: two runs may start at once
    shutil.rmtree(partial, ignore_errors=True)
    for name, rows in sets.items():
        _write_folder(partial / f"{name}_{digest}", rows, as_configs="corpus" in rows)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)  # another run was first, with the same content


def _write_folder(folder: Path, rows: Mapping[str, list[Row]], as_configs: bool) -> None:
    """JSON lines, and the README.md whose header tells `datasets` what they are: configs of a data set, or splits of one."""
    folder.mkdir(parents=True)
    header = ["---", "configs:"] + ([] if as_configs else ["- config_name: default", "  data_files:"])
    for name, values in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        split = "test" if as_configs else name
        header += [f"- config_name: {name}", "  data_files:"] if as_configs else []
        header += [f"  - split: {split}", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]), encoding="utf-8")


@dataclass(frozen=True)
class TaskSpec:
    """What MTEB has to know of a task.

    Attributes:
        name: of the task.
        kind: MTEB's type, which decides on its class.
        data: name of its set.
        main_score: one of those of the type.
        description: one line on what is asked.
        attributes: of the class, that depart from MTEB's.
    """

    name: str
    kind: "TaskType"
    data: str
    main_score: str
    description: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


def make_tasks(
    specs: Iterable[TaskSpec], folders: Mapping[str, Path], domains: list["TaskDomain"], licence: str, load: bool
) -> list["AbsTask"]:
    """The tasks on sets that `write_sets` wrote. Random states are left as they were (MTEB seeds them when a task is made).

    Args:
        folders: by the name of the set.
        domains: MTEB's, of all of their texts.
        licence: of the texts, as MTEB names it.
        load: reads their data now, so that evaluating them again and again reads no file; else MTEB does when it needs it.
    """
    with isolate_rng(), quiet_mteb():
        tasks = [_task(spec, folders[spec.data], domains, licence) for spec in specs]
        for task in tasks if load else []:
            task.load_data()
    return tasks


def _task(spec: TaskSpec, data: Path, domains: list["TaskDomain"], licence: str) -> "AbsTask":
    import mteb.abstasks
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        name=spec.name,
        description=spec.description,
        dataset={"path": str(data), "revision": data.name.rpartition("_")[2]},
        type=spec.kind,
        category="t2c" if spec.kind in ("Classification", "Clustering") else "t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=spec.main_score,
        domains=domains,
        annotations_creators="derived",
        sample_creation="found",
        license=licence,
    )
    base = getattr(mteb.abstasks, KINDS[str(spec.kind)].base)
    made: AbsTask = type(spec.name, (base,), {"metadata": metadata, **spec.attributes})()
    return made
