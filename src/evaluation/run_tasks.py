"""Runs MTEB tasks on an encoder, for evaluate.py and the callbacks."""

import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from src.evaluation.shared import dismiss, serve
from src.modules.distributed.ranks import ALONE, Ranks
from src.modules.encoder.encoder import RationaleEncoder
from src.utils.timing import clock

if TYPE_CHECKING:
    from mteb import ResultCache
    from mteb.abstasks import AbsTask
    from mteb.models.model_meta import ModelMeta

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationScores:
    """Main scores, as fractions.

    Attributes:
        tasks: main score by task, without those that failed.
        categories: mean over the tasks of a category (Retrieval, Clustering, ...).
        average: mean over tasks, as MTEB averages; NaN if all failed.
        failures: reason by task.
        without_data: failed tasks whose data is out of reach; they would fail for any encoder.
    """

    tasks: dict[str, float]
    categories: dict[str, float]
    average: float
    failures: dict[str, str] = field(default_factory=dict)
    without_data: tuple[str, ...] = ()

    def flat(self, prefix: str = "") -> dict[str, float]:
        """Returns metrics: `<prefix>task/<name>`, `<prefix>category/<name>`, `<prefix>average`."""
        named = {f"{prefix}task/{name}": score for name, score in self.tasks.items()}
        named |= {f"{prefix}category/{name}": score for name, score in self.categories.items()}
        return named | ({f"{prefix}average": self.average} if self.tasks else {})


class EvaluationStoppedError(RuntimeError):
    """An evaluation was to stop before its last task."""


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
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationScores:
    """Scores an encoder with `mteb.evaluate`; global random states stay as they were.

    A task that fails is logged and named in the scores; the others go on. The same task objects may be run again, with the same draws.

    Args:
        encoder: its weights must not change meanwhile.
        tasks: MTEB tasks.
        results_dir: of MTEB's result files: a task with a complete result of the same encoder and data is not run again. None: no files.
        name, embeddings_dir, embeddings_gib, also_without: see MTEBEncoder.
        unavailable: reasons by task, of tasks that are known to have no data and are not tried.
        announce: whether to log a line for every task.
        ranks: processes with the same encoder, which call this together: rank 0 runs the tasks, all embed, and all return the scores.
        stop: asked on rank 0 before every task.

    Raises:
        ValueError: a file in `embeddings_dir` is no cache of embeddings.
        EvaluationStoppedError: `stop` said so.
        RuntimeError: on the other ranks, rank 0 raised.
    """
    if ranks.rank > 0:
        with isolate_rng():
            found = serve(encoder, ranks)
        if isinstance(found, EvaluationScores):
            return found
        raise EvaluationStoppedError if found == "stopped" else RuntimeError("the evaluation failed on rank 0, which says why")
    ended: Any = None
    try:
        options = (results_dir, name, embeddings_dir, embeddings_gib, unavailable, announce, also_without, ranks, stop)
        ended = scores = _run_all(encoder, tasks, *options)
    except EvaluationStoppedError:
        ended = "stopped"
        raise
    finally:
        dismiss(ended, ranks)
    return scores


def _run_all(
    encoder: RationaleEncoder,
    tasks: Sequence["AbsTask"],
    results_dir: Path | None,
    name: str,
    embeddings_dir: Path | None,
    embeddings_gib: float,
    unavailable: Mapping[str, str] | None,
    announce: bool,
    also_without: bool,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> EvaluationScores:
    """Runs all tasks; see `run_tasks`."""
    from src.evaluation.mteb_encoder import MTEBEncoder
    from src.evaluation.result_files import AtomicResults

    runs: dict[str, _Run] = {}
    with isolate_rng(), _quiet_mteb(), TemporaryDirectory() as nowhere:
        cache = AtomicResults(results_dir or nowhere)
        with MTEBEncoder(encoder, name, embeddings_dir, embeddings_gib, also_without, ranks) as adapter:
            for number, task in enumerate(tasks, 1):
                task_name, began = task.metadata.name, time.monotonic()
                if stop():
                    raise EvaluationStoppedError(f"stopped before {task_name}, {number} of {len(tasks)}")
                known = (unavailable or {}).get(task_name)
                if known and cache.load_task_result(task_name, adapter.mteb_model_meta) is None:
                    runs[task_name] = _Run(failure=known, without_data=True)
                    continue
                run = runs[task_name] = _run(adapter, task, cache)
                if run.failure:
                    log.error("MTEB task %s (%d of %d) has no score: %s", task_name, number, len(tasks), run.failure)
                elif announce and run.score is not None:
                    taken = clock(time.monotonic() - began)
                    log.info("%s (%d of %d): %.2f, after %s", task_name, number, len(tasks), 100 * run.score, taken)
    return _summary(tasks, runs)


@dataclass(frozen=True)
class _Run:
    """The main score of a task, or the reason why there is none."""

    score: float | None = None
    failure: str | None = None
    without_data: bool = False


def _run(adapter: Any, task: "AbsTask", cache: "ResultCache") -> _Run:
    """Runs a task; of an aggregate first the parts, so that a part that fails is named."""
    import mteb

    for part in task.metadata.tasks if task.is_aggregate else ():  # type: ignore[attr-defined]
        run = _run(adapter, part, cache)
        if run.score is None:
            return replace(run, failure=f"{part.metadata.name}: {run.failure}")
    loaded_before = task.data_loaded
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)  # as in a new task
    with torch.autocast(adapter.model.policy.device.type, enabled=False):  # in bfloat16, cosines of similar texts would tie
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
            task.unload_data()  # MTEB does so after a success only
        return _Run(failure=" ".join(result.exceptions[0].exception.split()) or "no reason given", without_data=without_data)
    return _Run(float(result.task_results[0].validate_and_filter_scores(task).get_score()))


def _overwrite_strategy(task: "AbsTask", meta: "ModelMeta", cache: "ResultCache") -> str:
    """Returns MTEB's strategy for stored results: those of other data and incomplete ones are not used.

    A task's draws run on over its subsets, so one that was cut between two of them starts over.
    """
    if task.is_aggregate:  # computed from its parts' results at once; its stored result may be of others
        cache.get_task_result_path(task.metadata.name, meta).unlink(missing_ok=True)
        return "only-missing"
    stored = cache.load_task_result(task.metadata.name, meta)
    if stored is None:
        return "only-missing"
    missing = sum(map(len, stored.get_missing_evaluations(task).values()))
    was_cut = 0 < missing < len(task.eval_splits) * len(task.hf_subsets)
    return "always" if was_cut or stored.dataset_revision != task.metadata.dataset["revision"] else "only-missing"


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


@contextmanager
def _quiet_mteb() -> Iterator[None]:
    """Hides progress bars of `datasets`, INFO lines of mteb and scikit-learn's warnings about MTEB's classifiers.

    MTEB defines a classification score by 100 iterations of logistic regression, converged or not, and by precision over classes
    that may never be predicted. Newer versions of tasks are hidden too, as are failures, which the caller reports.
    """
    import datasets
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    logger = logging.getLogger("mteb")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(max(level, logging.WARNING))
    filtered = [logging.getLogger(name) for name in ("mteb.evaluate", "mteb.abstasks.abstask")]
    for other in filtered:
        other.addFilter(_is_news)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (ConvergenceWarning, UndefinedMetricWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", message=".* is superseded by .*")
            yield
    finally:
        logger.setLevel(level)
        for other in filtered:
            other.removeFilter(_is_news)
        if bars:
            datasets.enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "is superseded by" not in message and not message.startswith("Error while running task")
