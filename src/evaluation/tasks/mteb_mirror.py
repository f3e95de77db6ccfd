"""Copies of MTEB's data sets for machines without a network: `<folder>/<organisation>/<name>/<revision>/`."""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from src.datamodules.files import inside

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

log = logging.getLogger(__name__)


def copy_folder(data_dir: Path, name: str, revision: str) -> Path:
    """Returns the folder of the copy of a data set.

    It ends in the revision because `datasets` caches what it reads under the name of a folder, not its path.
    """
    return inside(data_dir.absolute(), f"{name}/{revision}")


def localised(task: "AbsTask", data_dir: Path) -> "AbsTask":
    """Returns a copy of a task that reads the local copy of its data, if there is one. MTEB shares the task itself."""
    if task.is_aggregate:
        parts = [localised(part, data_dir) for part in _parts(task)]
        aggregate = _with_metadata(task, tasks=parts)
        aggregate.tasks = parts  # type: ignore[attr-defined]
        aggregate.taskname_to_task = {part.metadata.name: part for part in parts}  # type: ignore[attr-defined]
        return aggregate
    dataset = task.metadata.dataset
    folder = copy_folder(data_dir, dataset["path"], dataset["revision"])
    return _with_metadata(task, dataset={**dataset, "path": str(folder)}) if folder.is_dir() else copy.copy(task)


def _parts(task: "AbsTask") -> list["AbsTask"]:
    return list(task.metadata.tasks) if task.is_aggregate else [task]  # type: ignore[attr-defined]


def _with_metadata(task: "AbsTask", **changes: Any) -> "AbsTask":
    """Returns a copy of a new class with other metadata: MTEB drops an object's own metadata when it unloads the data."""
    task = copy.copy(task)
    metadata = task.metadata.model_copy(update=changes)
    task.__dict__.pop("metadata", None)
    task.__class__ = type(type(task).__name__, (type(task),), {"metadata": metadata})
    return task


def download(tasks: Iterable["AbsTask"], data_dir: Path) -> dict[str, str]:
    """Copies the complete data sets of tasks at MTEB's revisions, unless they are there; resumes interrupted downloads.

    Returns:
        The reason for each data set that could not be downloaded.
    """
    datasets = [part.metadata.dataset for task in tasks for part in _parts(task)]
    wanted = list(dict.fromkeys((dataset["path"], dataset["revision"]) for dataset in datasets))
    failures: dict[str, str] = {}
    for number, (name, revision) in enumerate(wanted, 1):
        folder = copy_folder(data_dir, name, revision)
        if folder.is_dir():
            log.info("%s (%d of %d) is there", name, number, len(wanted))
            continue
        log.info("%s (%d of %d) to %s", name, number, len(wanted), folder)
        partial = folder.with_name(f"{revision}.partial")  # kept between runs, to be resumed
        try:
            snapshot_download(name, repo_type="dataset", revision=revision, local_dir=partial)
        except OSError as error:  # all that the hub's client raises for what is absent or out of reach
            failures[name] = " ".join(str(error).split())
            log.error("%s cannot be downloaded: %s", name, failures[name])
            continue
        partial.rename(folder)
    return failures
