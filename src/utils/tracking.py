"""What callbacks hand to the trainer's loggers outside of Lightning's own `log`: tables, figures, texts, late metrics.

Everything here does nothing on ranks other than 0, and nothing where there is no logger for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from matplotlib.figure import Figure

from src.utils.run_logger import RunLogger


def mlflow_logger(tracking_uri: str, artifact_location: str, **settings: Any) -> RunLogger:
    """A logger whose artifacts lie at `artifact_location` if its store is a local SQLite file.

    Any other store has a place of its own for them; a folder named here would keep them on this machine.
    """
    local = tracking_uri.startswith("sqlite:")
    return RunLogger(tracking_uri=tracking_uri, artifact_location=artifact_location if local else None, **settings)


def mlflow_loggers(trainer: L.Trainer) -> list[RunLogger]:
    """The MLflow loggers of a trainer; none on other ranks than 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)] if trainer.is_global_zero else []


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Metrics at a step, in one call a logger; for hooks in which Lightning's `log` is refused (start and end)."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)


def log_table(trainer: L.Trainer, columns: Mapping[str, Sequence[Any]], file: str) -> None:
    """A table as an MLflow artifact, e.g. `rationales/step_100.json`."""
    for logger in mlflow_loggers(trainer):
        logger.log_table(columns, file)


def log_text(trainer: L.Trainer, text: str, file: str) -> None:
    """A text file as an MLflow artifact."""
    for logger in mlflow_loggers(trainer):
        logger.log_text(text, file)


def log_figure(trainer: L.Trainer, figure: Figure, file: str) -> None:
    """A figure as an MLflow artifact."""
    for logger in mlflow_loggers(trainer):
        logger.log_figure(figure, file)


def write_text(path: Path, text: str) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
