"""Writes the HTML report when training ends."""

import logging
from pathlib import Path

import lightning as L
import requests
from mlflow.exceptions import MlflowException

from src.callbacks.html_report.page import FILE, read_run, render
from src.callbacks.monitoring import MonitoringCallback
from src.modules.policy_module import PolicyModule
from src.utils.tracking import mlflow_loggers, write_text

log = logging.getLogger(__name__)


class HTMLReport(MonitoringCallback[PolicyModule]):
    """Writes report.html from what the run has logged to MLflow, and logs it too; place it after the callbacks whose results it shows.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / FILE

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        loggers = mlflow_loggers(trainer)
        if trainer.is_global_zero and not loggers:
            log.info("no %s: it shows what a run logs to MLflow, and this one logs nothing there", FILE)
        for logger in loggers:
            try:
                page = render(read_run(logger.experiment, str(logger.run_id)))
            except (MlflowException, requests.RequestException):
                log.warning("MLflow does not answer, so there is no %s yet: python -m src.callbacks.html_report %s", FILE, logger.run_id)
                continue
            write_text(self.file, page)
            logger.log_text(page, FILE)
            log.info("the run on one page: %s", self.file)
