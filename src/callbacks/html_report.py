"""The report of a run as one HTML file without scripts that needs no other file, read from what the run logged to MLflow.

A callback writes it when training ends, and `python -m src.callbacks.html_report <run id>` at any time.
"""

import argparse
import base64
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import requests
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.callbacks.heat_strip import legend, scale_of, strip
from src.callbacks.monitoring import MonitoringCallback
from src.callbacks.rationale_table import Rationale
from src.modules.policy_module import PolicyModule
from src.utils.atomic import write_atomic
from src.utils.mlflow_store import default_store
from src.utils.plots import Curve, Similarities, TermHistory, curves_figure, reward_terms_figure, similarities_figure
from src.utils.secrets import redact
from src.utils.tracking import mlflow_loggers

log = logging.getLogger(__name__)

FILE = "report.html"

CURVES = {
    "validation tasks": "mteb/average",
    "rationale length": "rollout/rationale_length",
    "truncated share": "rollout/truncated_fraction",
    "distinct rationales": "rollout/distinct_rationales",
    "similarity of unrelated texts": "rollout/unrelated_similarity",
    "KL from the start": "kl/from_start",
    "entropy": "update/entropy",
    "gradient norm": "update/grad_norm",
    "loss": "update/loss",
    "mismatch of log-probs": "rollout/logprob_mismatch_mean",
    "sampled tokens a second": "throughput/rollout_tokens_per_second",
}
"""Titles and metrics of the curves, where the run has them."""

SETTINGS = ("policy.path", "reward._target_", "algorithm.advantage._target_", "module.num_generations", "module.learning_rate", "seed")
"""Parameters that are shown first."""

_NOT_REWARDS = ("step", "text", "rationale", "length", "finished", "pieces", "similarities")

Table = list[dict[str, Any]]
"""Rows."""


class HTMLReport(MonitoringCallback[PolicyModule]):
    """Writes report.html when training ends, and logs it too; place it after the callbacks whose results it shows.

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
            write_atomic(self.file, page)
            logger.log_text(page, FILE)
            log.info("the run on one page: %s", self.file)


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        run_id, name, status: in MLflow.
        params, tags: as logged.
        curves: metrics by name, sorted.
        rationales: (step, rationale) by text, in the order of the steps.
        similarities: by step.
        scores: the table of held-out tasks; empty where there is none.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    curves: dict[str, Curve]
    rationales: dict[str, list[tuple[int, Rationale]]]
    similarities: dict[int, Similarities]
    scores: Table


def read_run(client: MlflowClient, run_id: str) -> RunData:
    """Reads all that the report shows of a run.

    Raises:
        ValueError: no such run in that store.
        mlflow.exceptions.MlflowException, requests.RequestException: the store does not answer.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"no run {run_id!r} in {client.tracking_uri}: {error.message}") from error
    histories = {name: client.get_metric_history(run_id, name) for name in sorted(run.data.metrics)}
    rationales: dict[str, list[tuple[int, Rationale]]] = {}
    for step, table in _tables(client, run_id, "rationales", r"step_(\d+)\.json$").items():
        for row in table:
            written = (row["text"], row["rationale"], int(row["length"]), bool(row["finished"]))
            rewards = {name: float(row[name]) for name in row if name not in _NOT_REWARDS}
            explained = (row.get("pieces") or [], row.get("similarities") or [])
            rationales.setdefault(row["text"], []).append((step, Rationale(*written, rewards, *explained)))
    similarities: dict[int, dict[str, list[float]]] = {}
    for step, table in _tables(client, run_id, "similarities", r"step_(\d+)\.json$").items():
        for row in table:
            similarities.setdefault(step, {}).setdefault(row["kind"], []).append(float(row["cosine"]))
    return RunData(
        run_id=run_id,
        name=str(run.info.run_name),
        status=str(run.info.status),
        params=dict(sorted(run.data.params.items())),
        tags=dict(run.data.tags),
        curves={name: sorted((point.step, point.value) for point in history) for name, history in histories.items()},
        rationales=rationales,
        similarities=dict(similarities),
        scores=_tables(client, run_id, "report", r"test_scores()\.json$").get(0, []),
    )


def _tables(client: MlflowClient, run_id: str, folder: str, name: str) -> dict[int, Table]:
    """Returns the tables of an artifact folder by the number that `name` finds in theirs (none: 0), sorted."""
    found = {}
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with TemporaryDirectory() as place:
        for artifact in client.list_artifacts(run_id, folder):
            if match := re.search(name, artifact.path):
                file = client.download_artifacts(run_id, artifact.path, place)
                table = json.loads(Path(file).read_text(encoding="utf-8"))
                found[int(match[1] or 0)] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return dict(sorted(found.items()))


def render(run: RunData) -> str:
    """Returns the page: figures, scores, and the rationales of every text by step with their rewards; all text is escaped.

    The first and the last rationale of a text are heat strips.
    """
    ends = {text: {rows[0][0], rows[-1][0]} for text, rows in run.rationales.items()}
    shown = {(text, step): row for text, rows in run.rationales.items() for step, row in rows if row.pieces and step in ends[text]}
    scale = scale_of(row.similarities for row in shown.values())
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("html_report.html.jinja").render(
        run=run,
        figures=figures(run),
        strips={place: strip(row.pieces, row.similarities, scale) for place, row in shown.items()},
        legend=legend(scale) if scale else [],
        terms=list(dict.fromkeys(name for rows in run.rationales.values() for _, row in rows for name in row.rewards)),
        settings=[(name, run.params[name]) for name in SETTINGS if name in run.params],
        commit=run.tags.get("git.commit", ""),
    )


def figures(run: RunData) -> list[tuple[str, str]]:
    """Returns captions and pictures (`data:` addresses) of what the run has logged."""
    drawn: list[tuple[str, Figure]] = []
    if terms := term_histories(run.curves):
        caption = "Reward terms over rollout batches: mean, and the spread within groups that moves the gradient"
        drawn.append((caption, reward_terms_figure(terms)))
    if chosen := {title: run.curves[metric] for title, metric in CURVES.items() if metric in run.curves}:
        drawn.append(("The policy over rollout batches", curves_figure(chosen)))
    if run.similarities:
        names = {
            step: f"after {step} rollout batches" if step else "before training" for step in (min(run.similarities), max(run.similarities))
        }
        caption = "Cosines of queries to their documents and to others, on held-out records"
        drawn.append((caption, similarities_figure({name: run.similarities[step] for step, name in names.items()})))
    return [(caption, _data_address(figure)) for caption, figure in drawn]


def term_histories(curves: dict[str, Curve]) -> dict[str, TermHistory]:
    """Returns the reward terms among a run's curves (`reward/<term>/mean` and `reward/<term>/within_group_std`)."""
    histories = {}
    for name, curve in curves.items():
        term = name.removeprefix("reward/").removesuffix("/mean")
        if name == f"reward/{term}/mean":
            spread = dict(curves.get(f"reward/{term}/within_group_std", []))
            steps, means = [step for step, _ in curve], [value for _, value in curve]
            histories[term] = TermHistory(steps, means, [spread.get(step, float("nan")) for step in steps])
    return histories


def _data_address(figure: Figure) -> str:
    """Returns a figure as an SVG in an address; letters are shapes, so that it needs no font."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and writes report.html to a folder and to MLflow."""
    parser = argparse.ArgumentParser("html_report", description="Writes the HTML report of a run, finished or not.")
    parser.add_argument("run_id", help="as `make ui` shows it")
    parser.add_argument("--tracking-uri", default=default_store())
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
    write_atomic(options.folder / FILE, page)
    log.info("wrote %s", options.folder / FILE)


if __name__ == "__main__":
    main()
