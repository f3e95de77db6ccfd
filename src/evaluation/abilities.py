"""General abilities of a policy through lm-eval, and whether training kept them."""

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table

from src.evaluation.tasks.ability_tasks import ability_data, ability_tasks
from src.modules.policy.model import Policy, evaluation_mode

Task = str | dict[str, Any]
"""The name of an lm-eval task or group, or the configuration of a task."""

_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class AbilityScore:
    """Score of a policy on one task, or on all tasks of a group, question by question.

    Attributes:
        metric: the task's first; of a perplexity its log to base 2, of which differences have an interval.
        higher_is_better: whether more of it is better.
        values, weights: of each question or text, in the task's order; the score is the ratio of their sums (correct answers to questions,
            bits to bytes).
    """

    metric: str
    higher_is_better: bool
    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def score(self) -> float:
        return sum(self.values) / sum(self.weights)


@dataclass(frozen=True)
class Change:
    """An ability before and after training.

    Attributes:
        before, after: the scores.
        gain: the improvement, in the metric's unit; negative if it became worse.
        low, high: the 95 % interval of the gain, over the choice of questions.
        verdict: `kept` if the interval is above -tolerance, `lost` if it is below 0, else `unclear`: too few questions.
    """

    metric: str
    before: float
    after: float
    gain: float
    low: float
    high: float
    verdict: Literal["kept", "lost", "unclear"]


def compare(before: AbilityScore, after: AbilityScore, tolerance: float) -> Change:
    """Returns the paired difference of two runs of the same questions.

    The score is a ratio of sums, so the standard error is the linearised one of a ratio estimator (Cochran, Sampling Techniques, 3rd ed.,
    section 6.4) of the differences: sqrt(n / (n - 1) * sum e_i^2) / sum w_i, where e_i = d_i - gain * w_i. With weights of 1 it is that of
    a mean.

    Args:
        tolerance: the largest loss that counts as none, in the metric's unit.

    Raises:
        ValueError: other questions, another metric, or a tolerance below 0.
    """
    if (before.metric, before.weights) != (after.metric, after.weights):
        raise ValueError(f"scores of other questions or metrics do not compare: {before.metric}, {after.metric}")
    if tolerance < 0:
        raise ValueError(f"abilities.tolerance={tolerance}: it must be at least 0")
    sign = 1 if before.higher_is_better else -1
    differences = [sign * (new - old) for old, new in zip(before.values, after.values, strict=True)]
    n, total = len(differences), sum(before.weights)
    gain = sum(differences) / total
    squares = sum((d - gain * w) ** 2 for d, w in zip(differences, before.weights, strict=True))
    half = 1.96 * math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.inf
    low, high = gain - half, gain + half
    verdict: Literal["kept", "lost", "unclear"] = "kept" if low >= -tolerance else "lost" if high < 0 else "unclear"
    return Change(before.metric, before.score, after.score, gain, low, high, verdict)


def run_abilities(
    policy: Policy,
    tasks: str | Sequence[str],
    packages: Sequence[str],
    cache_dir: Path | str,
    count: int = 200,
    batch_size: int = 16,
) -> dict[str, AbilityScore]:
    """Scores a policy on each task; its modes and all random states stay as they were.

    Args:
        tasks: `offline`, those of `ability_tasks`; or names of lm-eval tasks and groups (gsm8k, mmlu), whose data is on the hub.
        packages, cache_dir: of the offline tasks.
        count: questions a task, the first ones of a task from the hub.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        FileNotFoundError: no such task, or its data is out of reach.
        ValueError: the first metric of a task is not a number for each question.
    """
    asked = check_abilities(tasks, packages, cache_dir, count)
    with isolate_rng(), _quiet(), evaluation_mode(policy):
        found = _evaluate(policy, asked, count, batch_size)
    return {name: _score(name, found) for name in map(_name, asked)}


def check_abilities(tasks: str | Sequence[str], packages: Sequence[str], cache_dir: Path | str, count: int = 200) -> list[Task]:
    """Checks that the tasks exist, before any model is loaded; not whether their data on the hub is in reach.

    Arguments and errors are those of `run_abilities`.

    Returns:
        The tasks, as lm-eval takes them.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("general abilities are measured by lm-eval, which is not installed: pip install -e '.[abilities]'")
    if tasks == "offline":
        return [*ability_tasks(ability_data(packages, cache_dir, count))]
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    with isolate_rng(), _quiet():
        unknown = [name for name in names if name not in _task_manager().all_tasks]
    if unknown:
        raise FileNotFoundError(f"lm-eval has no task or group named {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    return [*names]


@functools.cache
def _task_manager(defaults: bool = True) -> Any:
    """Returns lm-eval's index of its tasks, some 10,000 files, read once a process; without `defaults` an empty one."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _name(task: Task) -> str:
    return task if isinstance(task, str) else str(task["task"])


def _evaluate(policy: Policy, tasks: Sequence[Task], count: int, batch_size: int) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=batch_size)
    options = {"task_manager": _task_manager(any(isinstance(task, str) for task in tasks)), "limit": count, "bootstrap_iters": 0}
    try:
        found: Mapping[str, Any] = lm_eval.simple_evaluate(model, tasks=list(tasks), **options)
    except OSError as error:  # all that the hub's client raises for data out of reach
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the data of {', '.join(map(_name, tasks))} is out of reach ({reason}): abilities.tasks=offline needs no hub"
        ) from error
    return found


def _score(name: str, found: Mapping[str, Any]) -> AbilityScore:
    """Returns the score of a task, or of all tasks of a group."""
    subtasks = list(_leaves(name, found["group_subtasks"]))
    samples = [sample for subtask in subtasks for sample in found["samples"][subtask]]
    metric, first_filter = samples[0]["metrics"][0], samples[0]["filter"]
    pairs = [_number(name, metric, sample.get(metric)) for sample in samples if sample["filter"] == first_filter]
    shown = f"log2({metric})" if metric in _PERPLEXITIES else metric
    better = bool(found["higher_is_better"][subtasks[0]][metric])
    return AbilityScore(shown, better, tuple(value for value, _ in pairs), tuple(weight for _, weight in pairs))


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not members.get(name):
        yield name
    for member in members.get(name, ()):
        yield from _leaves(member, members)


def _number(task: str, metric: str, value: Any) -> tuple[float, float]:
    """Returns value and weight of a sample; of a log-likelihood its bits, and its words or bytes."""
    if isinstance(value, tuple | list) and len(value) == 2 and metric in (*_PERPLEXITIES, "bits_per_byte"):
        return -float(value[0]) / math.log(2), float(value[1])
    if isinstance(value, bool | int | float):
        return (-float(value) / math.log(2) if metric in _PERPLEXITIES else float(value)), 1.0
    raise ValueError(f"the first metric of {task}, {metric}, is not a number for each question, so its change has no interval")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides lm-eval's warnings of a model that exists already and of bootstraps left out; both are meant."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def ability_metrics(changes: Mapping[str, Change]) -> dict[str, float]:
    """Returns metrics: abilities/<task>/before, after, gain, gain_low, gain_high."""
    names = {"before": "before", "after": "after", "gain": "gain", "gain_low": "low", "gain_high": "high"}
    return {f"abilities/{task}/{name}": getattr(change, field) for task, change in changes.items() for name, field in names.items()}


_HEADER = ("ability", "metric", "before", "after", "gain", "95 % interval", "verdict")


def _cells(task: str, change: Change) -> tuple[str, ...]:
    interval = f"{change.low:+.4f} .. {change.high:+.4f}"
    return task, change.metric, f"{change.before:.4f}", f"{change.after:.4f}", f"{change.gain:+.4f}", interval, change.verdict


def ability_table(changes: Mapping[str, Change], title: str = "General abilities") -> Table:
    """Returns a table for a terminal, a row a task."""
    table = Table(title=title)
    for column in _HEADER:
        table.add_column(column, justify="left" if column in ("ability", "metric", "verdict") else "right")
    for task, change in changes.items():
        table.add_row(*_cells(task, change))
    return table


def ability_markdown(changes: Mapping[str, Change]) -> str:
    """Returns the same table in Markdown."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (_HEADER, *(_cells(task, change) for task, change in changes.items()))]
    return "\n".join([rows[0], "| --- | --- | ---: | ---: | ---: | ---: | --- |", *rows[1:], ""])
