"""Runs MTEB tasks on an encoder; evaluate.py and the callback that looks on while training share it."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng

from src.datamodules.files import inside
from src.modules.encoder import RationaleEncoder
from src.utils.quiet import quiet_mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationScores:
    """Main scores, as fractions of one.

    Attributes:
        tasks: main score by task, without those that failed.
        categories: mean over a category's tasks (Retrieval, Clustering, ...).
        average: mean over tasks, as MTEB averages; NaN where every task failed.
        failures: reason by task.
    """

    tasks: dict[str, float]
    categories: dict[str, float]
    average: float
    failures: dict[str, str] = field(default_factory=dict)

    def flat(self, prefix: str = "") -> dict[str, float]:
        """Names and numbers for a logger: `<prefix>task/<name>`, `<prefix>category/<name>`, `<prefix>average`."""
        named = {f"{prefix}task/{name}": score for name, score in self.tasks.items()}
        named |= {f"{prefix}category/{name}": score for name, score in self.categories.items()}
        return named | ({f"{prefix}average": self.average} if self.tasks else {})


def run_tasks(encoder: RationaleEncoder, tasks: Sequence["AbsTask"], results_dir: Path | None, name: str) -> EvaluationScores:
    """Scores an encoder with `mteb.evaluate`; global random states are left as they were.

    A task that fails does not stop the others: it is logged, and named with its reason in the scores. The same task
    objects may be run again and give the same draws (bootstraps, undersampling).

    Args:
        encoder: its weights must not change meanwhile.
        tasks: MTEB tasks, e.g. of `offline_tasks`.
        results_dir: where MTEB keeps its result files; what is there for the same encoder and the same data is not
            computed again. None: no files.
        name: of the model in those files.
    """
    import mteb

    from src.modules.mteb_encoder import MTEBEncoder

    cache = mteb.ResultCache(results_dir) if results_dir else None
    scores: dict[str, float] = {}
    categories: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    with isolate_rng(), quiet_mteb():
        adapter: Any = MTEBEncoder(encoder, name)  # MTEB's protocols are narrower than its own AbsEncoder
        for task in tasks:
            task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)  # as a new task has them
            result = mteb.evaluate(
                adapter,
                task,
                cache=cache,
                overwrite_strategy="always" if _is_stale(cache, task, adapter) else "only-missing",
                encode_kwargs={"batch_size": 512, "show_progress_bar": False},
                raise_error=False,
                co2_tracker=False,
                show_progress_bar=False,
            )
            for error in result.exceptions or []:
                failures[error.task_name] = error.exception
                log.error("MTEB task %s failed: %s", error.task_name, error.exception)
            for done in result.task_results:
                scores[done.task_name] = float(done.get_score())
                categories.setdefault(task.metadata.type, []).append(scores[done.task_name])
    return EvaluationScores(
        tasks=scores,
        categories={kind: fmean(values) for kind, values in categories.items()},
        average=fmean(scores.values()) if scores else float("nan"),
        failures=failures,
    )


def _is_stale(cache: Any, task: "AbsTask", adapter: Any) -> bool:
    """Whether a stored result is of other data under the same name; MTEB itself would reuse it."""
    stored = cache.load_task_result(task.metadata.name, adapter.mteb_model_meta) if cache else None
    return stored is not None and stored.dataset_revision != task.metadata.dataset["revision"]


def named_tasks(names: Sequence[str], mirror: Path | str | None = None) -> list["AbsTask"]:
    """MTEB's tasks of these names in English, where a name may be a benchmark's: `MTEB(eng, v1)` is the paper's 56 tasks.

    Args:
        mirror: a folder that holds copies of data sets under their hub names (`mteb/banking77`), read where it has one.

    Raises:
        ValueError: no task or benchmark of such a name.
    """
    import mteb

    benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
    tasks: list[AbsTask] = []
    with isolate_rng():
        for name in names:
            try:
                tasks += mteb.get_benchmark(name).tasks if name in benchmarks else mteb.get_tasks(tasks=[name], languages=["eng"])
            except KeyError as error:
                raise ValueError(f"MTEB has no task or benchmark named {name!r}: {error.args[0]}") from error
    for task in tasks:
        local = inside(mirror, task.metadata.dataset["path"]) if mirror else None
        if local and local.is_dir():
            dataset = {**task.metadata.dataset, "path": str(local)}
            task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return tasks
