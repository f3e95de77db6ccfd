"""What a run comes to: scores on held-out tasks before and after, and where everything lies."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.callbacks.probe import start_embeddings, undisturbed
from src.callbacks.rationale_table import RationaleTable
from src.callbacks.watcher import Watcher
from src.modules.policy_module import PolicyModule
from src.utils.evaluation import run_tasks
from src.utils.plots import scores_figure
from src.utils.tracking import log_figure, log_metrics, log_table, log_text, mlflow_loggers, write_text

log = logging.getLogger(__name__)

BASE, REASONING = "Base", "Base + reasoning"
"""The first rows: starting weights without rationales, and with them. The last is the trained policy, by its method's name."""

_PLACES = {
    "report.md": "this report",
    "test_scores.png": "scores, as a figure",
    "reward_terms.png": "reward terms over training",
    "rationales.md": "rationales before and after",
    "similarities.png": "similarities before and after",
    "export": "trained policy, for transformers",
}

_SHORT = {"Retrieval": "Retr", "Reranking": "Rerank", "Clustering": "Clust", "PairClassification": "PairCls", "Classification": "Class"}


class FinalReport(Watcher):
    """Scores the starting policy when training starts and the trained one when it ends, on tasks that nothing else sees.

    A policy that is trained with rationales is scored with them, and its start without and with them; one that is trained
    without is scored without, and so is its start.

    Prints the table, some rationales before and after, and where everything is; writes report.md and test_scores.png;
    logs test/<row>/<task>, test/<row>/average, the table and the figure.

    Args:
        output_dir: the run's folder.
        tasks: makes the tasks; called once.
        temperature: at which rationales are written; 0 is greedy.
        examples: rationales printed, where the rationale table is on.
        embeddings_dir: where embeddings of the starting policy are kept, for other runs that begin with it (the points of a sweep, other
            seeds, evaluate.py); None: nowhere. See `start_embeddings`.
        embeddings_gib: most that they may take there.
    """

    def __init__(
        self,
        output_dir: str,
        tasks: Callable[[], list[Any]],
        temperature: float = 0.0,
        examples: int = 3,
        embeddings_dir: str | None = None,
        embeddings_gib: float = 50.0,
    ) -> None:
        self.output_dir, self.make_tasks = Path(output_dir), tasks
        self.embeddings_dir, self.embeddings_gib = embeddings_dir, embeddings_gib
        self.temperature, self.examples = temperature, examples
        self.rows: dict[str, dict[str, float]] = {}  # row -> category or average -> score
        self._tasks: list[Any] = []
        self._on: dict[str, str] | None = None  # the data of each task by its name, once the starting policy was scored

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        with undisturbed(module):
            self._tasks = self.make_tasks()
        on = {task.metadata.name: str(task.metadata.dataset["revision"]) for task in self._tasks}
        if self._on is not None:  # resumed: the checkpoint brought what the starting policy scored
            if self._on != on:
                log.warning("the held-out tasks are not those of before the stop: the starting policy's scores on them stay unknown")
                self.rows, self._on = {}, on
            return
        self._on = on
        with_them = module.settings.rationale
        log.info("scoring the starting policy on %d held-out tasks, without%s rationales", len(self._tasks), " and with" * with_them)
        self.score(trainer, module, BASE, rationale=False)
        if with_them:
            self.score(trainer, module, REASONING, rationale=True)

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        log.info("scoring the trained policy on %d held-out tasks", len(self._tasks))
        self.score(trainer, module, module.title, rationale=module.settings.rationale)
        if trainer.is_global_zero:
            self.write(trainer, module)
            self.show(trainer)

    def score(self, trainer: L.Trainer, module: PolicyModule, row: str, rationale: bool) -> None:
        """Adds a row and logs it.

        Raises:
            RuntimeError: a task fails; rows over different tasks would not compare.
        """
        with undisturbed(module):
            encoder = module.encoder(rationale=rationale, temperature=self.temperature)
            name = f"{_slug(row)}-step{module.rollout_batches}"
            results = self.output_dir / "mteb" if trainer.is_global_zero else None
            kept = start_embeddings(trainer, module, self.embeddings_dir)
            scores = run_tasks(encoder, self._tasks, results, name, kept, self.embeddings_gib)
        scores = trainer.strategy.broadcast(scores)
        if scores.failures:
            failed = "; ".join(f"{task}: {error}" for task, error in scores.failures.items())
            raise RuntimeError(
                f"held-out tasks fail for {row}: {failed}; take them out of callbacks.final_report.tasks or provide what is missing"
            )
        self.rows[row] = {**scores.categories, "average": scores.average}
        metrics = {f"test/{_slug(row)}/{task}": score for task, score in (scores.tasks | {"average": scores.average}).items()}
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

    def show(self, trainer: L.Trainer) -> None:
        """Prints the table, rationales before and after, and the places."""
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(score_table(self.rows))
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
    return row.lower().replace(" + ", "_")


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
