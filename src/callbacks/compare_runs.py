"""Prints the differences of two runs: `python -m src.callbacks.compare_runs RUN RUN`. A run is an id of MLflow's or a run's folder."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.callbacks.html_report import RunData, read_run
from src.utils.mlflow_store import default_store
from src.utils.run_history import MACHINE
from src.utils.run_logger import RUN
from src.utils.secrets import redact

_PLACES = {"paths", "logger", "callbacks", "sweep_run"}
"""Groups of parameters that say where things are, and what is shown."""

_CODE = ("git.", "version.", "hardware.")


def run_id_of(run: str) -> str:
    """Returns the id of a run that is named by itself or by its folder."""
    file = Path(run) / "mlflow" / RUN
    return str(json.loads(file.read_text(encoding="utf-8"))["run_id"]) if file.is_file() else run


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Returns name and both values of what differs; a dash where a run has none."""
    names = sorted(first.keys() | second.keys())
    return [(name, first.get(name, "-"), second.get(name, "-")) for name in names if first.get(name) != second.get(name)]


def settings(run: RunData) -> dict[str, str]:
    """Returns parameters but for places, and the tags of code, packages and machine."""
    return {name: value for name, value in run.params.items() if re.split("[./]", name)[0] not in _PLACES} | {
        name: value for name, value in run.tags.items() if name.startswith(_CODE)
    }


def metrics(first: RunData, second: RunData) -> list[tuple[str, float, float]]:
    """Returns name and last values of the metrics that both runs have, without those of the machine; scores first."""
    names = [name for name in first.curves if name in second.curves and not name.startswith(MACHINE)]
    names.sort(key=lambda name: (not name.startswith(("test/", "mteb/", "eval/")), name))
    return [(name, first.curves[name][-1][1], second.curves[name][-1][1]) for name in names]


def tables(first: RunData, second: RunData, texts: int = 3) -> list[Table]:
    """Returns the tables of settings, metrics and rationales (the last of each text that both runs watched)."""
    columns = (f"{first.name} {first.run_id[:8]}", f"{second.name} {second.run_id[:8]}")
    changed = Table("setting", *columns, title="Settings that differ")
    for row in differences(settings(first), settings(second)):
        changed.add_row(*map(_cell, row))
    scores = Table("metric", *columns, "difference", title="Last values of metrics")
    for name, one, other in metrics(first, second):
        scores.add_row(name, f"{one:.4g}", f"{other:.4g}", "" if math.isclose(one, other) else f"{other - one:+.4g}")
    written = Table("text", *columns, title="Rationales after the last batch", show_lines=True)
    for text in [text for text in first.rationales if text in second.rationales][:texts]:
        written.add_row(*(_cell(cell) for cell in (text, *(run.rationales[text][-1][1].rationale for run in (first, second)))))
    return [table for table in (changed, scores, written) if table.row_count]


def _cell(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return escape(text if len(text) <= limit else text[: limit - 1] + "…")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser("compare_runs", description="Prints what differs between two runs: settings, metrics, rationales.")
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run's id in MLflow, or its folder")
    parser.add_argument("--tracking-uri", default=default_store(), help="default: MLFLOW_TRACKING_URI, or this project's own store")
    parser.add_argument("--texts", type=int, default=3, help="rationales to print")
    options = parser.parse_args(arguments)
    client = MlflowClient(options.tracking_uri)
    try:
        first, second = (read_run(client, run_id_of(run)) for run in options.runs)
    except (ValueError, MlflowException, requests.RequestException) as error:
        raise SystemExit(f"compare_runs: {redact(str(error).splitlines()[0])}") from error
    for table in tables(first, second, options.texts):
        Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
