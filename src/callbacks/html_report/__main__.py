"""Writes the HTML report of a run, finished or not: `python -m src.callbacks.html_report <run id>`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.callbacks.html_report.page import FILE, read_run, render
from src.utils.secrets import redact
from src.utils.tracking import write_text

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[3]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and writes report.html to a folder and to MLflow."""
    parser = argparse.ArgumentParser("html_report", description="Writes the HTML report of a run, finished or not.")
    parser.add_argument("run_id", help="as `make ui` shows it")
    parser.add_argument("--tracking-uri", default=f"sqlite:///{_ROOT}/mlflow.db")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where report.html goes, besides MLflow")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    client = MlflowClient(options.tracking_uri)
    try:
        page = render(read_run(client, options.run_id))
        client.log_text(options.run_id, page, FILE)
    except (ValueError, MlflowException, requests.RequestException) as error:
        raise SystemExit(f"html_report: {redact(str(error).splitlines()[0])}") from error
    write_text(options.folder / FILE, page)
    log.info("wrote %s", options.folder / FILE)


if __name__ == "__main__":
    main()
