"""Which encoders evaluate.py sets side by side, and the table that it makes of their scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from src.utils.evaluation import EvaluationScores

BASE, REASONING, TRAINED = "Base", "Base + reasoning", "Trained"


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: of the row and of its MLflow run.
        path: a training checkpoint, an exported folder or a hub name.
        rationale: whether it writes rationales.
    """

    name: str
    path: str
    rationale: bool


def latest_export(output_root: Path | str) -> Path | None:
    """The newest exported policy of any training run, <output_root>/<run>/<time>/export; None if there is none."""
    configs = Path(output_root).glob("*/*/export/config.json")
    newest = max(configs, key=lambda file: (file.stat().st_mtime, str(file)), default=None)
    return newest.parent if newest else None


def contenders(model: str | None, rationale: bool, base: str, output_root: Path | str) -> list[Contender]:
    """The one that `model` names; or, without it, the starting policy without and with rationales and the latest trained one."""
    if model is not None:
        return [Contender(f"{Path(model).name}, {'with' if rationale else 'without'} rationales", model, rationale)]
    rows = [Contender(BASE, base, rationale=False), Contender(REASONING, base, rationale=True)]
    trained = latest_export(output_root)
    return rows + ([Contender(TRAINED, str(trained), rationale=True)] if trained else [])


def comparison_table(rows: Mapping[str, EvaluationScores], title: str) -> Table:
    """Main scores in percent: a line a task, below it the category's mean where it has several tasks; a column a row."""
    table = Table(title=title)
    table.add_column("task")
    for name in rows:
        table.add_column(name, justify="right")

    def line(label: str, values: list[float | None], style: str = "") -> None:
        table.add_row(label, *("failed" if value is None else f"{100 * value:.2f}" for value in values), style=style)

    tasks = dict.fromkeys(name for scores in rows.values() for name in (*scores.tasks, *scores.failures))
    for task in tasks:
        line(task, [scores.tasks.get(task) for scores in rows.values()])
    table.add_section()
    categories = dict.fromkeys(name for scores in rows.values() for name in scores.categories)
    if len(categories) < len(tasks):  # otherwise they would repeat the tasks
        for category in categories:
            line(category, [scores.categories.get(category) for scores in rows.values()])
        table.add_section()
    line("average", [scores.average if scores.tasks else None for scores in rows.values()], style="bold")
    return table
