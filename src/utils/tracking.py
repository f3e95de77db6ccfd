"""Logging to the trainer's loggers outside of Lightning's `log`: tables, figures, texts, late metrics. Does nothing on ranks but 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from matplotlib.figure import Figure

from src.utils.run_logger import RunLogger


def mlflow_loggers(trainer: L.Trainer) -> list[RunLogger]:
    """Returns the trainer's MLflow loggers; none on ranks but 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)] if trainer.is_global_zero else []


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Logs metrics at a step in one call per logger; also in hooks in which Lightning's `log` is not allowed (start and end)."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)


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
