"""Logging to the trainer's loggers outside of Lightning's `log`: tables, figures, texts, late metrics. Does nothing on ranks but 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from matplotlib.figure import Figure

from src.utils.data_contents import DataContents
from src.utils.run_logger import RunLogger


def mlflow_loggers(trainer: L.Trainer) -> list[RunLogger]:
    """Returns the trainer's MLflow loggers; none on ranks but 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)] if trainer.is_global_zero else []


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Logs metrics at a step in one call per logger; also in hooks in which Lightning's `log` is not allowed (start and end)."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)


def log_tasks(trainer: L.Trainer, tasks: Sequence[Any]) -> None:
    """Links the data sets of MTEB tasks to the run, as data to evaluate on."""
    for logger in mlflow_loggers(trainer):
        for task in tasks:
            logger.log_data(task_contents(task), "evaluation")


def task_contents(task: Any) -> DataContents:
    """Returns what an MTEB task's data is; its rows are counted if they are loaded."""
    dataset = task.metadata.dataset
    return DataContents(
        task.metadata.name, str(dataset.get("path", "")), str(dataset.get("revision", "")), _rows(task.dataset) if task.data_loaded else 0
    )


def _rows(data: Any) -> int:
    """Returns the rows of a data set, or of all in a nested mapping of them."""
    return sum(map(_rows, data.values())) if isinstance(data, Mapping) else int(getattr(data, "num_rows", 0))


def log_table(trainer: L.Trainer, columns: Mapping[str, Sequence[Any]], file: str) -> None:
    """Logs a table as an MLflow artifact, e.g. `rationales/step_100.json`."""
    for logger in mlflow_loggers(trainer):
        logger.log_table(columns, file)


def log_text(trainer: L.Trainer, text: str, file: str) -> None:
    """Logs a text file as an MLflow artifact."""
    for logger in mlflow_loggers(trainer):
        logger.log_text(text, file)


def log_figure(trainer: L.Trainer, figure: Figure, file: str) -> None:
    """Logs a figure as an MLflow artifact."""
    for logger in mlflow_loggers(trainer):
        logger.log_figure(figure, file)
