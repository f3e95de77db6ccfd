"""MTEB's task objects by the names of tasks and benchmarks."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.seed import isolate_rng

from src.evaluation.tasks.mteb_mirror import localised
from src.evaluation.tasks.own_tasks import find_own_tasks, own_task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

OWN = "own"
"""Name of all own tasks of the data folder together."""

_ENGLISH = ("MTEB(eng, v1)", "MTEB(eng, v2)")
"""A task named alone gets the subsets and splits of the first of these that has it, so that its score compares with published ones."""


def named_tasks(names: Sequence[str], data_dir: Path | str | None = None) -> list["AbsTask"]:
    """Returns the tasks of these names, each once, in their order; of two with one name the first.

    A name is that of an MTEB benchmark (`MTEB(eng, v2)`, or mteb_eng_v2: letters and digits count), of an own task that is described in
    `data_dir`, the path of such a description, `own` for all of them, or that of an MTEB task. Descriptions are read only where a name may
    need one.

    Args:
        data_dir: a folder with copies of MTEB's data sets, which are used in place of the hub's, and with own tasks.

    Raises:
        FileNotFoundError: no such description, or `own` and there is none.
        ValueError: no task or benchmark of such a name, or a description or its data is malformed.
    """
    own = functools.cache(lambda: find_own_tasks(data_dir) if data_dir else {})
    found: dict[str, AbsTask] = {}
    with isolate_rng():  # MTEB seeds them when a task is made
        for name in names:
            for task in _tasks(name, own, data_dir):
                found.setdefault(task.metadata.name, task)
    return list(found.values())


def _tasks(name: str, own: Callable[[], dict[str, Path]], data_dir: Path | str | None) -> list["AbsTask"]:
    if name == OWN:
        if not own():
            raise FileNotFoundError(f"no task of your own in {data_dir}: a YAML file there, or a folder below, describes one")
        return [own_task(file) for file in own().values()]
    if name.endswith((".yaml", ".yml")):
        return [own_task(Path(name))]
    found = _benchmark(name)
    if not found and name in own():
        return [own_task(own()[name])]
    found = found or [_mteb_task(name)]
    return [localised(task, Path(data_dir)) if data_dir else task for task in found]


def _benchmark(name: str) -> list["AbsTask"]:
    """Returns the tasks of MTEB's benchmark of this name; none where there is no such benchmark."""
    import mteb

    return next((list(benchmark.tasks) for benchmark in mteb.get_benchmarks() if _plain(benchmark.name) == _plain(name)), [])


def _mteb_task(name: str) -> "AbsTask":
    import mteb

    for task in [task for benchmark in _ENGLISH for task in _benchmark(benchmark)]:
        if task.metadata.name == name:
            return task
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"MTEB has no task or benchmark named {name!r}, and no task of your own is: {error.args[0]}") from error


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
