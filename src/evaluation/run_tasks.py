"""Runs MTEB tasks on an encoder; evaluate.py and the callbacks that look on while training share it."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from src.modules.encoder.encoder import RationaleEncoder
from src.utils.quiet import quiet_mteb
from src.utils.timing import clock

if TYPE_CHECKING:
    from mteb import ResultCache
    from mteb.abstasks import AbsTask
    from mteb.models.model_meta import ModelMeta

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationScores:
    """Main scores, as fractions of one.

    Attributes:
        tasks: main score by task, without those that failed.
        categories: mean over a category's tasks (Retrieval, Clustering, ...).
        average: mean over tasks, as MTEB averages; NaN where every task failed.
        failures: reason by task.
        without_data: those of the failures whose data could not be had; they would fail for any encoder.
    """

    tasks: dict[str, float]
    categories: dict[str, float]
    average: float
    failures: dict[str, str] = field(default_factory=dict)
    without_data: tuple[str, ...] = ()

    def flat(self, prefix: str = "") -> dict[str, float]:
        """Names and numbers for a logger: `<prefix>task/<name>`, `<prefix>category/<name>`, `<prefix>average`."""
        named = {f"{prefix}task/{name}": score for name, score in self.tasks.items()}
        named |= {f"{prefix}category/{name}": score for name, score in self.categories.items()}
        return named | ({f"{prefix}average": self.average} if self.tasks else {})


def run_tasks(
    encoder: RationaleEncoder,
    tasks: Sequence["AbsTask"],
    results_dir: Path | None,
    name: str,
    embeddings_dir: Path | None = None,
    embeddings_gib: float = 1.0,
    unavailable: Mapping[str, str] | None = None,
    announce: bool = False,
    also_without: bool = False,
) -> EvaluationScores:
    """Scores an encoder with `mteb.evaluate`; global random states are left as they were.

    A task that fails does not stop the others: it is logged, and named with its reason in the scores. The same task
    objects may be run again and give the same draws (bootstraps, undersampling).

    Args:
        encoder: its weights must not change meanwhile.
        tasks: MTEB tasks, e.g. of `offline_tasks`.
        results_dir: where MTEB keeps its result files; a task that is there for the same encoder and the same data is not
            computed again, one that was cut in the middle is. None: no files.
        name: of the model in those files.
        embeddings_dir: where embeddings are kept for other runs; None: in memory, for this one.
        embeddings_gib: most that they may take.
        unavailable: reasons by task, of tasks that are known to fail and are not tried.
        announce: a line in the log for every task.
        also_without: see MTEBEncoder.

    Raises:
        ValueError: a file in `embeddings_dir` that is no cache of embeddings.
    """
    from src.evaluation.mteb_encoder import MTEBEncoder
    from src.evaluation.result_files import WholeResults

    runs: dict[str, _Run] = {}
    with isolate_rng(), quiet_mteb(), TemporaryDirectory() as nowhere:
        cache = WholeResults(results_dir or nowhere)
        with MTEBEncoder(encoder, name, embeddings_dir, embeddings_gib, also_without) as adapter:
            for number, task in enumerate(tasks, 1):
                known = (unavailable or {}).get(task.metadata.name)
                began = time.monotonic()
                if known and cache.load_task_result(task.metadata.name, adapter.mteb_model_meta) is None:
                    runs[task.metadata.name] = _Run(failure=known, without_data=True)
                    continue
                run = runs[task.metadata.name] = _run(adapter, task, cache)
                if run.failure:
                    log.error("MTEB task %s (%d of %d) has no score: %s", task.metadata.name, number, len(tasks), run.failure)
                elif announce and run.score is not None:
                    score, taken = 100 * run.score, clock(time.monotonic() - began)
                    log.info("%s (%d of %d): %.2f, after %s", task.metadata.name, number, len(tasks), score, taken)
    return _summary(tasks, runs)


@dataclass(frozen=True)
class _Run:
    """What became of a task: its main score, or why there is none."""

    score: float | None = None
    failure: str | None = None
    without_data: bool = False


def _run(adapter: Any, task: "AbsTask", cache: "ResultCache") -> _Run:
    """Runs a task and, before it, the parts of an aggregate, so that a part that fails is told as such."""
    parts = list(task.metadata.tasks) if task.is_aggregate else []  # type: ignore[attr-defined]
    for part in parts:
        run = _run(adapter, part, cache)
        if run.score is None:
            return replace(run, failure=f"{part.metadata.name}: {run.failure}")
    return _evaluate(adapter, task, cache)


def _evaluate(adapter: Any, task: "AbsTask", cache: "ResultCache") -> _Run:
    import mteb

    loaded_before = task.data_loaded
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)  # as a new task has them
    # in bfloat16, cosines of texts that all lie close together would tie
    with torch.autocast(adapter.arithmetic["device_type"], enabled=False):
        result = mteb.evaluate(
            adapter,
            task,
            cache=cache,
            overwrite_strategy=_overwrite_strategy(task, adapter.mteb_model_meta, cache),
            encode_kwargs={"batch_size": 512, "show_progress_bar": False},
            raise_error=False,
            co2_tracker=False,
            show_progress_bar=False,
        )
    if result.exceptions:
        without_data = not task.data_loaded
        if task.data_loaded and not loaded_before:
            task.unload_data()  # which MTEB does after a success alone
        return _Run(failure=_one_line(result.exceptions[0].exception), without_data=without_data)
    return _Run(float(result.task_results[0].validate_and_filter_scores(task).get_score()))


def _overwrite_strategy(task: "AbsTask", meta: "ModelMeta", cache: "ResultCache") -> str:
    """Whether MTEB may go on from what is stored: not from other data under the same name, and not in the middle of a task.

    The draws of a task follow one another over its subsets, so one that was cut between two of them starts over.
    """
    if task.is_aggregate:  # made of its parts' results in no time, and its own may be of others
        cache.get_task_result_path(task.metadata.name, meta).unlink(missing_ok=True)
        return "only-missing"
    stored = cache.load_task_result(task.metadata.name, meta)
    if stored is None:
        return "only-missing"
    missing = sum(map(len, stored.get_missing_evaluations(task).values()))
    was_cut = 0 < missing < len(task.eval_splits) * len(task.hf_subsets)
    return "always" if was_cut or stored.dataset_revision != task.metadata.dataset["revision"] else "only-missing"


def _one_line(message: str) -> str:
    return " ".join(message.split()) or "no reason given"


def _summary(tasks: Sequence["AbsTask"], runs: Mapping[str, _Run]) -> EvaluationScores:
    scores = {name: run.score for name, run in runs.items() if run.score is not None}
    categories: dict[str, list[float]] = {}
    for task in tasks:
        if task.metadata.name in scores:
            categories.setdefault(task.metadata.type, []).append(scores[task.metadata.name])
    return EvaluationScores(
        tasks=scores,
        categories={kind: fmean(values) for kind, values in categories.items()},
        average=fmean(scores.values()) if scores else float("nan"),
        failures={name: run.failure for name, run in runs.items() if run.failure is not None},
        without_data=tuple(name for name, run in runs.items() if run.without_data),
    )
