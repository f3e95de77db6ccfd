"""Copies of MTEB's data sets in a folder, for machines without a network: `<folder>/<organisation>/<name>/<revision>/`."""

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
    """Where the copy of a data set lies.

    It ends in the revision, for `datasets` keeps what it reads under a folder's own name and not its path.
    """
    return inside(data_dir.absolute(), f"{name}/{revision}")


def parts(task: "AbsTask") -> list["AbsTask"]:
    """The tasks that have data: an aggregate's parts, or the task itself."""
    return list(task.metadata.tasks) if task.is_aggregate else [task]  # type: ignore[attr-defined]


def localised(task: "AbsTask", data_dir: Path) -> "AbsTask":
    """The task, reading the copy of its data where there is one. The task itself, which MTEB shares, is left alone."""
    if task.is_aggregate:
        own = [localised(part, data_dir) for part in parts(task)]
        aggregate = _with_metadata(task, tasks=own)
        aggregate.tasks = own  # type: ignore[attr-defined]
        aggregate.taskname_to_task = {part.metadata.name: part for part in own}  # type: ignore[attr-defined]
        return aggregate
    dataset = task.metadata.dataset
    folder = copy_folder(data_dir, dataset["path"], dataset["revision"])
    return _with_metadata(task, dataset={**dataset, "path": str(folder)}) if folder.is_dir() else copy.copy(task)


def _with_metadata(task: "AbsTask", **changes: Any) -> "AbsTask":
    """A copy with other metadata, which is its class's: an object's own is dropped by MTEB when the data is unloaded."""
    task = copy.copy(task)
    metadata = task.metadata.model_copy(update=changes)
    task.__dict__.pop("metadata", None)
    task.__class__ = type(type(task).__name__, (type(task),), {"metadata": metadata})
    return task


def download(tasks: Iterable["AbsTask"], data_dir: Path) -> dict[str, str]:
    """Copies the data of the tasks, whole data sets at the revisions that MTEB names; what is there already stays.

    A copy that was interrupted is gone on with, and counts for nothing before it is whole.

    Returns:
        Reason by data set, of those that could not be had. The others are there.
    """
    wanted = list(
        dict.fromkeys((part.metadata.dataset["path"], part.metadata.dataset["revision"]) for task in tasks for part in parts(task))
    )
    failures: dict[str, str] = {}
    for number, (name, revision) in enumerate(wanted, 1):
        folder = copy_folder(data_dir, name, revision)
        if folder.is_dir():
            log.info("%s (%d of %d) is there", name, number, len(wanted))
            continue
        log.info("%s (%d of %d) to %s", name, number, len(wanted), folder)
        partial = folder.with_name(f"{revision}.partial")
        try:
            snapshot_download(name, repo_type="dataset", revision=revision, local_dir=partial)
        except OSError as error:  # all that the hub's client raises for what is not there or not in reach
            failures[name] = " ".join(str(error).split())
            log.error("%s cannot be had: %s", name, failures[name])
            continue
        partial.rename(folder)
    return failures
