"""The run as one HTML file, written when training ends."""

import logging
from pathlib import Path

import lightning as L
import requests
from mlflow.exceptions import MlflowException

from src.callbacks.monitoring import MonitoringCallback
from src.modules.policy_module import PolicyModule
from src.utils.run_data import read_run
from src.utils.run_report import FILE, render
from src.utils.tracking import mlflow_loggers, write_text

log = logging.getLogger(__name__)


class HTMLReport(MonitoringCallback):
    """Writes report.html (curves, similarities, rationales by step) from what the run has logged, and logs it too.

    It reads the tables and metrics of an MLflow run, so it comes after the callbacks that log them; without such a logger
    there is nothing to read, and it says so, as where MLflow does not answer.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / FILE

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        loggers = mlflow_loggers(trainer)
        if trainer.is_global_zero and not loggers:
            log.info("no %s: it is made of what a run logs to MLflow, and this one logs nothing there", FILE)
        for logger in loggers:
            try:
                page = render(read_run(logger.experiment, str(logger.run_id)))
            except (MlflowException, requests.RequestException):
                log.warning("MLflow does not answer, so there is no %s yet: python -m src.utils.run_report %s", FILE, logger.run_id)
                continue
            write_text(self.file, page)
            logger.log_text(page, FILE)
            log.info("the run on one page: %s", self.file)
