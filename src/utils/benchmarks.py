"""Names of benchmarks and tasks to MTEB's task objects."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.seed import isolate_rng

from src.datamodules.mteb_mirror import localised
from src.datamodules.own_tasks import find_own_tasks, own_task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

OWN = "own"
"""Stands for all own tasks of the data folder."""


def named_tasks(names: Sequence[str], data_dir: Path | str | None = None) -> list["AbsTask"]:
    """The tasks that the names stand for, each once, in their order.

    A name is that of an MTEB benchmark (`MTEB(eng, v2)`, or mteb_eng_v2: letters and digits decide), of an MTEB task (in
    English), of a task of one's own that is described in `data_dir`, the path of such a description, or `own` for all of
    them.

    Args:
        data_dir: a folder with copies of MTEB's data sets, read where it has one, and with tasks of one's own.

    Raises:
        FileNotFoundError: no such description, or `own` and there is none.
        ValueError: no task or benchmark of such a name, or a description or its data is malformed.
    """
    own = find_own_tasks(data_dir) if data_dir else {}
    with isolate_rng():  # MTEB seeds them when a task is made
        found = [task for name in names for task in _tasks(name, own, data_dir)]
    return list({task.metadata.name: task for task in found}.values())


def _tasks(name: str, own: dict[str, Path], data_dir: Path | str | None) -> list["AbsTask"]:
    if name == OWN:
        if not own:
            raise FileNotFoundError(f"no task of your own in {data_dir}: a YAML file there, or a folder below, describes one")
        return [own_task(file) for file in own.values()]
    if name.endswith((".yaml", ".yml")):
        return [own_task(Path(name))]
    if name in own:
        return [own_task(own[name])]
    return [localised(task, Path(data_dir)) if data_dir else task for task in _mteb_tasks(name)]


def _mteb_tasks(name: str) -> list["AbsTask"]:
    import mteb

    benchmarks = {_plain(benchmark.name): benchmark for benchmark in mteb.get_benchmarks()}
    if _plain(name) in benchmarks:
        return list(benchmarks[_plain(name)].tasks)
    try:
        return list(mteb.get_tasks(tasks=[name], languages=["eng"]))
    except KeyError as error:
        raise ValueError(f"MTEB has no task or benchmark named {name!r}, and no task of your own is: {error.args[0]}") from error


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
