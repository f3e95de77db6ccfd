"""What a run comes to: scores on held-out tasks before and after, and where everything lies."""

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

from src.callbacks.monitoring import MonitoringCallback
from src.callbacks.probe import in_training_arithmetic, start_embeddings, undisturbed
from src.callbacks.rationale_table import RationaleTable
from src.evaluation.run_tasks import EvaluationScores, run_tasks
from src.modules.policy_module import PolicyModule
from src.utils.plots import scores_figure
from src.utils.tracking import log_figure, log_metrics, log_table, log_text, mlflow_loggers, write_text

log = logging.getLogger(__name__)

BASE, REASONING = "Base", "Base + reasoning"
"""The first rows: starting weights without rationales, and with them. The last are the trained policy, by its method's name."""
WITHOUT = " without rationales"

_PLACES = {
    "report.md": "this report",
    "test_scores.png": "scores, as a figure",
    "reward_terms.png": "reward terms over training",
    "rationales.md": "rationales before and after",
    "similarities.png": "similarities before and after",
    "export": "trained policy, for transformers",
}

_SHORT = {"Retrieval": "Retr", "Reranking": "Rerank", "Clustering": "Clust", "PairClassification": "PairCls", "Classification": "Class"}


class FinalReport(MonitoringCallback):
    """Scores the starting policy when training starts and the trained one when it ends, on tasks that nothing else sees.

    A policy that is trained with rationales is scored without and with them, before and after, each pair from one pass over the texts;
    one that is trained without is scored without, unless asked.

    Prints the table, what was gained, some rationales before and after, and where everything is; writes report.md and test_scores.png;
    logs test/<row>/<task>, test/<row>/average, the table and the figure.

    Args:
        output_dir: the run's folder.
        tasks: by the name of a group of tasks (docstrings, everyday) what makes them; each called once.
        rationales: whether with rationales too; None: if the policy is trained with them.
        temperature: at which rationales are written; 0 is greedy.
        examples: rationales printed, where the rationale table is on.
        embeddings_dir: where embeddings of the starting policy are kept, for other runs that begin with it (the points of a sweep, other
            seeds, evaluate.py); None: nowhere. See `start_embeddings`.
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
        self.rows: dict[str, dict[str, float]] = {}  # row -> column -> score
        self._tasks: list[Any] = []
        self._groups: dict[str, list[str]] = {}  # group -> its tasks
        self._on: dict[str, str] | None = None  # the data of each task by its name, once the starting policy was scored

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        with undisturbed(module):
            made = {group: make() for group, make in self.make_tasks.items()}
        self._tasks = [task for tasks in made.values() for task in tasks]
        self._groups = {group: [task.metadata.name for task in tasks] for group, tasks in made.items()}
        on = {
            f"{group}: {task.metadata.name}": str(task.metadata.dataset["revision"]) for group, tasks in made.items() for task in tasks
        }  # grouped otherwise, rows have other columns
        if self._on is not None:  # resumed: the checkpoint brought what the starting policy scored
            if self._on != on:
                log.warning("the held-out tasks are not those of before the stop: the starting policy's scores on them stay unknown")
                self.rows, self._on = {}, on
            return
        self._on = on
        log.info("scoring the starting policy on %d held-out tasks", len(self._tasks))
        kept = start_embeddings(trainer, module, self.embeddings_dir)
        self._score_both(trainer, module, BASE, REASONING, kept)

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        log.info("scoring the trained policy on %d held-out tasks", len(self._tasks))
        with TemporaryDirectory() as kept:
            own_rows = (
                (module.title + WITHOUT, module.title) if module.settings.rationale else (module.title, f"{module.title} + reasoning")
            )
            self._score_both(trainer, module, *own_rows, Path(kept) if trainer.world_size == 1 else None)
        if trainer.is_global_zero:
            self.write(trainer, module)
            self.show(trainer, module)

    def _score_both(self, trainer: L.Trainer, module: PolicyModule, plain: str, reasoning: str, kept: Path | None) -> None:
        """Adds the row without rationales and, where it is asked for, the one with them."""
        if not (module.settings.rationale if self.rationales is None else self.rationales):
            self.score(trainer, module, plain, rationale=False, kept=kept)
            return
        self.rows[plain] = {}  # stands first, and is scored second: with rationales the embeddings without come for nothing
        self.score(trainer, module, reasoning, rationale=True, kept=kept)
        self.score(trainer, module, plain, rationale=False, kept=kept)

    def score(self, trainer: L.Trainer, module: PolicyModule, row: str, rationale: bool, kept: Path | None = None) -> None:
        """Adds a row and logs it; `kept` is where embeddings are found and left.

        Raises:
            RuntimeError: a task fails; rows over different tasks would not compare.
        """
        with undisturbed(module), in_training_arithmetic(trainer):
            encoder = module.encoder(rationale=rationale, temperature=self.temperature)
            name = f"{_slug(row)}-step{module.rollout_batches}"
            results = self.output_dir / "mteb" if trainer.is_global_zero else None
            scores = run_tasks(encoder, self._tasks, results, name, kept, self.embeddings_gib, also_without=True)
        scores = trainer.strategy.broadcast(scores)
        if scores.failures:
            failed = "; ".join(f"{task}: {error}" for task, error in scores.failures.items())
            raise RuntimeError(
                f"held-out tasks fail for {row}: {failed}; take them out of callbacks.final_report.tasks or provide what is missing"
            )
        self.rows[row] = columns_of(scores, self._groups)
        metrics = {f"test/{_slug(row)}/{task}": score for task, score in (scores.tasks | {"average": scores.average}).items()}
        if len(self._groups) > 1:
            metrics |= {
                f"test/{_slug(row)}/{group}/average": fmean(scores.tasks[t] for t in tasks) for group, tasks in self._groups.items()
            }
        log_metrics(trainer, metrics, module.rollout_batches)

    def write(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """report.md, test_scores.png, and the same in MLflow."""
        title = f"Held-out tasks after {module.rollout_batches} {module.unit}es"
        figure = scores_figure(self.rows, title)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output_dir / "test_scores.png")
        log_figure(trainer, figure, "figures/test_scores.png")
        report = markdown(self.rows, title, self.output_dir)
        write_text(self.output_dir / "report.md", report)
        log_text(trainer, report, "report.md")
        columns = {name: [scores[name] for scores in self.rows.values()] for name in next(iter(self.rows.values()))}
        log_table(trainer, {"policy": list(self.rows), **columns}, "report/test_scores.json")

    def show(self, trainer: L.Trainer, module: PolicyModule) -> None:
        """Prints the table, the gain in words, rationales before and after, and the places."""
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(score_table(self.rows))
        start = REASONING if module.settings.rationale else BASE
        if start in self.rows and module.title in self.rows:
            console.print(gain_in_words(self.rows, module.title, start), markup=False)
        watched = [callback for callback in trainer.callbacks if isinstance(callback, RationaleTable)]  # type: ignore[attr-defined]
        if watched and watched[0].before and self.examples:
            console.print(example_table(watched[0], self.examples))
        for what, where in self.places(trainer):
            console.print(f"{what:34s} {where}", soft_wrap=True, highlight=False, markup=False)

    def places(self, trainer: L.Trainer) -> list[tuple[str, str]]:
        """What the run leaves behind, and where."""
        found = [(what, str(self.output_dir / file)) for file, what in _PLACES.items() if (self.output_dir / file).exists()]
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            found.append(("checkpoints, for ckpt_path=", str(trainer.checkpoint_callback.dirpath)))
        return found + [("MLflow run (make ui)", str(logger.run_id)) for logger in mlflow_loggers(trainer)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {row: scores for row, scores in self.rows.items() if row in (BASE, REASONING)}, "on": self._on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._on = dict(state_dict["rows"]), state_dict["on"]


def _slug(row: str) -> str:
    return row.lower().replace(" + ", "_").replace(" ", "_")


def columns_of(scores: EvaluationScores, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns what a row shows: the categories and the average of one group of tasks; of several the retrieval and the average of each."""
    if len(groups) == 1:
        return {**scores.categories, "average": scores.average}
    columns: dict[str, float] = {}
    for group, tasks in groups.items():
        retrieval = [scores.tasks[task] for task in tasks if "Retrieval" in task]
        columns |= {f"{group} nDCG@10": fmean(retrieval)} if retrieval else {}
        columns[f"{group} average"] = fmean(scores.tasks[task] for task in tasks)
    return columns | {"average": scores.average}


def gain_in_words(rows: Mapping[str, Mapping[str, float]], trained: str, start: str) -> str:
    """Returns one line: what the row of the trained policy scores above that of its start."""
    gains = {column: 100 * (rows[trained][column] - rows[start][column]) for column in rows[trained]}
    return f"{trained} over {start}, in points: " + ", ".join(f"{column} {gain:+.1f}" for column, gain in gains.items())


def score_table(rows: dict[str, dict[str, float]]) -> Table:
    """The scores in percent, a row a policy."""
    table = Table(title="Held-out tasks: main score of each category, %")
    table.add_column("", no_wrap=True)
    columns = list(next(iter(rows.values())))
    for column in columns:
        table.add_column(_SHORT.get(column, column), justify="right")
    for row, scores in rows.items():
        table.add_row(row, *(f"{100 * scores[column]:.2f}" for column in columns))
    return table


def example_table(watched: RationaleTable, count: int) -> Table:
    """The first `count` watched texts with the rationales of the starting and of the trained policy."""
    table = Table(title="Rationales", show_lines=True, expand=True)
    for column in ("text", "before", "after"):
        table.add_column(column, ratio=1)
    for old, new in list(zip(watched.before, watched.after, strict=True))[:count]:
        table.add_row(*(_cell(text) for text in (old.text, old.rationale, new.rationale)))
    return table


def _cell(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return escape(text if len(text) <= limit else text[: limit - 1] + "…")  # rich reads square brackets as markup


def markdown(rows: dict[str, dict[str, float]], title: str, folder: Path) -> str:
    """The table as a page, with the figures and the rationales that lie in `folder`."""
    columns = list(next(iter(rows.values())))
    lines = [f"# {title}", "", "Main score of each category, %.", ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {row} | " + " | ".join(f"{100 * scores[c]:.2f}" for c in columns) + " |" for row, scores in rows.items()]
    beside = {
        "test_scores.png": "![scores]({})",
        "reward_terms.png": "![reward terms]({})",
        "rationales.md": "Rationales: [before and after]({})",
    }
    for file, link in beside.items():
        if (folder / file).exists():
            lines += ["", link.format(file)]
    return "\n".join(lines) + "\n"
