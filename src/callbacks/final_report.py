"""Report at the end of a run: scores on held-out tasks before and after, and where everything is."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.callbacks.monitoring import MonitoringCallback, save_figure, undisturbed
from src.callbacks.mteb_eval import named, score_policy, starting_embeddings
from src.callbacks.rationale_table import RationaleTable
from src.evaluation.run_tasks import EvaluationScores
from src.modules.policy_module import PolicyModule
from src.utils.atomic import write_atomic
from src.utils.plots import scores_figure
from src.utils.tracking import log_metrics, log_table, log_tasks, log_text, mlflow_loggers

log = logging.getLogger(__name__)

BASE, REASONING = "Base", "Base + reasoning"
"""Rows of the starting policy, without and with rationales. The trained policy's have the name of its method."""

_FILES = {
    "report.md": "this report",
    "test_scores.png": "scores, as a figure",
    "reward_terms.png": "reward terms over training",
    "rationales.md": "rationales before and after",
    "similarities.png": "similarities before and after",
    "export": "trained policy, for transformers",
}

_SHORT = {"Retrieval": "Retr", "Reranking": "Rerank", "Clustering": "Clust", "PairClassification": "PairCls", "Classification": "Class"}

Rows = Mapping[str, Mapping[str, float]]
"""Scores, as fractions, by row (a policy) and column (a category, or a group of tasks)."""


class FinalReport(MonitoringCallback[PolicyModule]):
    """Scores the starting policy when training starts and the trained one when it ends, on held-out tasks.

    With rationales and without, both from one pass over the texts; a policy that is trained without rationales is scored without, unless
    `rationales` says otherwise. Prints the scores, the gain, some rationales and the files of the run; writes report.md and
    test_scores.png; logs test/<row>/<task>, test/<row>/average, the table and the figure.

    Args:
        output_dir: the run's folder.
        tasks: makes the tasks of each group (docstrings, everyday); called once.
        rationales: whether with rationales too; None: if the policy is trained with them.
        temperature: of the rationales; 0 is greedy.
        examples: rationales printed, if there is a rationale table.
        embeddings_dir: where embeddings of the starting policy are kept; see `starting_embeddings`.
        embeddings_gib: most that they may take there.
    """

    def __init__(
        self,
        output_dir: str,
        tasks: Mapping[str, Callable[[], list[Any]]],
        rationales: bool | None = None,
        temperature: float = 0.0,
        examples: int = 3,
        embeddings_dir: str | None = None,
        embeddings_gib: float = 50.0,
    ) -> None:
        self.output_dir, self.make_tasks = Path(output_dir), dict(tasks)
        self.embeddings_dir, self.embeddings_gib = embeddings_dir, embeddings_gib
        self.rationales, self.temperature, self.examples = rationales, temperature, examples
        self.rows: dict[str, dict[str, float]] = {}
        self.scores: dict[str, EvaluationScores] = {}  # of the rows of this process, for the model card
        self._tasks: list[Any] = []
        self._groups: dict[str, list[str]] = {}  # names of a group's tasks
        self._scored_on: dict[str, str] | None = None  # revisions of the data by task, once the starting policy is scored

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        with undisturbed(module):
            made = {group: make() for group, make in self.make_tasks.items()}
        self._tasks = [task for tasks in made.values() for task in tasks]
        log_tasks(trainer, self._tasks)
        self._groups = {group: [task.metadata.name for task in tasks] for group, tasks in made.items()}
        data = {f"{group}: {t.metadata.name}": str(t.metadata.dataset["revision"]) for group, tasks in made.items() for t in tasks}
        if self._scored_on is None:
            log.info("scoring the starting policy on %d held-out tasks", len(self._tasks))
            self._score_rows(trainer, module, BASE, REASONING, starting_embeddings(module, self.embeddings_dir))
        elif self._scored_on != data:
            log.warning("the held-out tasks are not those of the start of this run: the starting policy has no scores on them")
            self.rows = {}
        self._scored_on = data

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        log.info("scoring the trained policy on %d held-out tasks", len(self._tasks))
        title, trained_with = module.title, module.settings.rationale != "none"
        rows = (f"{title} without rationales", title) if trained_with else (title, f"{title} + reasoning")
        with TemporaryDirectory() as kept:
            self._score_rows(trainer, module, *rows, Path(kept))
        if trainer.is_global_zero:
            self.write(trainer, module)
            self.show(trainer, module)

    def _score_rows(self, trainer: L.Trainer, module: PolicyModule, without: str, reasoning: str, embeddings_dir: Path | None) -> None:
        """Adds the row without rationales and, if asked for, the one with them."""
        self.rows[without] = {}  # the first row, scored last: an encoder with rationales computes its embeddings on the way
        if module.settings.rationale != "none" if self.rationales is None else self.rationales:
            self.score(trainer, module, reasoning, True, embeddings_dir)
        self.score(trainer, module, without, False, embeddings_dir)

    def score(self, trainer: L.Trainer, module: PolicyModule, row: str, rationale: bool, embeddings_dir: Path | None = None) -> None:
        """Adds a row and logs it; raises RuntimeError if a task fails, as rows over different tasks do not compare."""
        slug = row.lower().replace(" + ", "_").replace(" ", "_")
        options = {"rationale": rationale, "temperature": self.temperature}
        name, results = f"{slug}-step{module.rollout_batches}", self.output_dir / "mteb" if trainer.is_global_zero else None
        scores = score_policy(trainer, module, self._tasks, name, options, results, embeddings_dir, self.embeddings_gib)
        if scores.failures:
            raise RuntimeError(
                f"held-out tasks fail for {row}: {named(scores.failures)}; take them out of callbacks.final_report.tasks or provide what "
                "is missing"
            )
        self.rows[row], self.scores[row] = columns_of(scores, self._groups), scores
        metrics = {f"test/{slug}/{task}": score for task, score in (scores.tasks | {"average": scores.average}).items()}
        if len(self._groups) > 1:
            metrics |= {f"test/{slug}/{group}/average": fmean(scores.tasks[t] for t in tasks) for group, tasks in self._groups.items()}
        log_metrics(trainer, metrics, module.rollout_batches)

    def write(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """Writes report.md and test_scores.png, and logs both and the table."""
        title = f"Held-out tasks after {module.rollout_batches} {module.unit}es"
        save_figure(trainer, scores_figure(self.rows, title), self.output_dir / "test_scores.png")
        report = markdown(self.rows, title, self.output_dir)
        write_atomic(self.output_dir / "report.md", report)
        log_text(trainer, report, "report.md")
        columns = {name: [scores[name] for scores in self.rows.values()] for name in _columns(self.rows)}
        log_table(trainer, {"policy": list(self.rows), **columns}, "report/test_scores.json")

    def show(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """Prints the scores, the gain, rationales before and after, and the files of the run."""
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(score_table(self.rows))
        start = REASONING if module.settings.rationale != "none" else BASE
        if start in self.rows:
            console.print(gain_in_words(self.rows, module.title, start), markup=False)
        for table in [callback for callback in trainer.callbacks if isinstance(callback, RationaleTable)]:  # type: ignore[attr-defined]
            if table.before and self.examples:
                console.print(example_table(table, self.examples))
        places = [(what, str(self.output_dir / file)) for file, what in _FILES.items() if (self.output_dir / file).exists()]
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            places.append(("checkpoints, for ckpt_path=", str(trainer.checkpoint_callback.dirpath)))
        for what, where in [*places, *(("MLflow run (make ui)", logger.run_id) for logger in mlflow_loggers(trainer))]:
            console.print(f"{what:34s} {where}", soft_wrap=True, highlight=False, markup=False)

    @property
    def tasks(self) -> list[Any]:
        """MTEB's task objects, once training has started."""
        return self._tasks

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {row: scores for row, scores in self.rows.items() if row in (BASE, REASONING)}, "on": self._scored_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._scored_on = dict(state_dict["rows"]), state_dict["on"]


def columns_of(scores: EvaluationScores, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns a row: the categories and the average of a single group of tasks; of several groups the retrieval and average of each."""
    if len(groups) == 1:
        return {**scores.categories, "average": scores.average}
    columns: dict[str, float] = {}
    for group, tasks in groups.items():
        retrieval = [scores.tasks[task] for task in tasks if "Retrieval" in task]
        columns |= {f"{group} nDCG@10": fmean(retrieval)} if retrieval else {}
        columns[f"{group} average"] = fmean(scores.tasks[task] for task in tasks)
    return columns | {"average": scores.average}


def _columns(rows: Rows) -> list[str]:
    return list(next(iter(rows.values())))


def gain_in_words(rows: Rows, trained: str, start: str) -> str:
    """Returns one line: the scores of the trained policy less those of its start."""
    gains = {column: 100 * (rows[trained][column] - rows[start][column]) for column in rows[trained]}
    return f"{trained} over {start}, in points: " + ", ".join(f"{column} {gain:+.1f}" for column, gain in gains.items())


def score_table(rows: Rows) -> Table:
    """Returns the scores in percent, a row a policy."""
    table = Table(title="Held-out tasks: main score of each category, %")
    table.add_column("", no_wrap=True)
    for column in _columns(rows):
        table.add_column(_SHORT.get(column, column), justify="right")
    for row, scores in rows.items():
        table.add_row(row, *(f"{100 * scores[column]:.2f}" for column in _columns(rows)))
    return table


def example_table(rationales: RationaleTable, count: int) -> Table:
    """Returns the first `count` texts with the rationales of the starting and of the trained policy."""
    table = Table(title="Rationales", show_lines=True, expand=True)
    for column in ("text", "before", "after"):
        table.add_column(column, ratio=1)
    for old, new in list(zip(rationales.before, rationales.after, strict=True))[:count]:
        table.add_row(*(_cell(text) for text in (old.text, old.rationale, new.rationale)))
    return table


def _cell(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return escape(text if len(text) <= limit else text[: limit - 1] + "…")  # rich reads square brackets as markup


def markdown(rows: Rows, title: str, folder: Path) -> str:
    """Returns the table as a page, with the figures and rationales of `folder` that exist."""
    lines = [f"# {title}", "", "Main score of each category, %.", ""]
    lines += ["| | " + " | ".join(_columns(rows)) + " |", "| --- |" + " ---: |" * len(_columns(rows))]
    lines += [f"| {row} | " + " | ".join(f"{100 * scores[c]:.2f}" for c in _columns(rows)) + " |" for row, scores in rows.items()]
    links = {
        "test_scores.png": "![scores]({})",
        "reward_terms.png": "![reward terms]({})",
        "rationales.md": "Rationales: [before and after]({})",
    }
    for file, link in links.items():
        if (folder / file).exists():
            lines += ["", link.format(file)]
    return "\n".join(lines) + "\n"
