"""Which encoders evaluate.py sets side by side, and the table that it makes of their scores."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from src.evaluation.run_tasks import EvaluationScores

BASE, REASONING, TRAINED = "Base", "Base + reasoning", "Trained"


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: of the row and of its MLflow run.
        model_name: in MTEB's result files.
        path: a training checkpoint, an exported folder or a hub name.
        rationale: whether it writes rationales; None: if it was trained with them.
    """

    name: str
    model_name: str
    path: str
    rationale: bool | None

    def settled(self, trained_with: bool) -> "Contender":
        """The same with what the model's own settings say filled in, and told by the name where it is not the usual."""
        if self.rationale is not None:
            return self
        name = self.name if trained_with else f"{self.name}, without rationales"
        return replace(self, name=name, rationale=trained_with)


def latest_export(output_root: Path | str) -> Path | None:
    """The newest exported policy of any training run, <output_root>/<run>/<time>/export; None if there is none."""
    configs = Path(output_root).glob("*/*/export/config.json")
    newest = max(configs, key=lambda file: (file.stat().st_mtime, str(file)), default=None)
    return newest.parent if newest else None


def model_name(path: str) -> str:
    """`organisation/name` for MTEB's result files: a hub name as it is, a local path by the end of it.

    `outputs/tiny_sup/2026-11-21_10-00-00/export` is `grace/tiny_sup_2026-11-21_10-00-00`.
    """
    if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not Path(path).exists():
        return path
    if path.startswith("package:"):
        return "grace/" + path.removeprefix("package:")
    parts = Path(path).absolute().parts[1:]
    own = [part for part in parts if part not in ("export", "checkpoints", "weights")][-2:]
    return "grace/" + re.sub(r"[^\w.-]+", "-", "_".join(own)).removesuffix(".ckpt")


def contenders(model: str | None, rationale: bool | None, base: str, output_root: Path | str, name: str | None = None) -> list[Contender]:
    """The one that `model` names; or, without it, the starting policy without and with rationales and the latest trained one.

    `rationale` says whether the named or the trained one writes rationales; None leaves it to what it was trained for.
    `name` is what `model` is called in MTEB's result files.
    """
    if model is not None:
        how = "" if rationale is None else f", {'with' if rationale else 'without'} rationales"
        return [Contender(f"{Path(model).name}{how}", name or model_name(model), model, rationale)]
    rows = [Contender(row, model_name(base), base, rationale=row == REASONING) for row in (BASE, REASONING)]
    trained = latest_export(output_root)
    return rows + ([Contender(TRAINED, model_name(str(trained)), str(trained), rationale)] if trained else [])


def comparison_table(rows: Mapping[str, EvaluationScores], title: str) -> Table:
    """Main scores in percent: a line a task, below it the category's mean where it has several tasks; a column a row."""
    table = Table(title=title)
    table.add_column("task")
    for name in rows:
        table.add_column(name, justify="right")

    def line(label: str, values: list[float | None]) -> None:
        table.add_row(label, *("failed" if value is None else f"{100 * value:.2f}" for value in values))

    tasks = dict.fromkeys(name for scores in rows.values() for name in (*scores.tasks, *scores.failures))
    for task in tasks:
        line(task, [scores.tasks.get(task) for scores in rows.values()])
    table.add_section()
    categories = dict.fromkeys(name for scores in rows.values() for name in scores.categories)
    if len(categories) < len(tasks):  # otherwise they would repeat the tasks
        for category in categories:
            line(category, [scores.categories.get(category) for scores in rows.values()])
        table.add_section()
    table.add_row("average", *(_average(scores, len(tasks)) for scores in rows.values()), style="bold")
    return table


def _average(scores: EvaluationScores, tasks: int) -> str:
    """In percent; one of fewer tasks than there are says so, for it compares with no other."""
    if not scores.tasks:
        return "failed"
    return f"{100 * scores.average:.2f}" + (f" ({len(scores.tasks)} of {tasks} tasks)" if len(scores.tasks) < tasks else "")
