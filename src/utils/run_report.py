"""A run as one HTML file that needs nothing else: `python -m src.utils.run_report <run id>` for a run that still goes on."""

import argparse
import base64
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import requests
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.utils.plots import Curve, TermHistory, curves_figure, reward_terms_figure, similarities_figure
from src.utils.run_data import RunData, read_run
from src.utils.secrets import redact
from src.utils.tracking import write_text

log = logging.getLogger(__name__)

FILE = "report.html"
_ROOT = Path(__file__).resolve().parents[2]
_TEMPLATE = "run_report.html.jinja"

CURVES = {
    "validation tasks": "mteb/average",
    "rationale length": "rollout/rationale_length",
    "truncated share": "rollout/truncated_fraction",
    "distinct rationales": "rollout/distinct_rationales",
    "similarity of unrelated texts": "rollout/unrelated_similarity",
    "divergence from the start": "kl/from_start",
    "entropy": "update/entropy",
    "gradient norm": "update/grad_norm",
    "loss": "update/loss",
    "gap of log-probs": "rollout/logprob_mismatch_mean",
    "sampled tokens a second": "throughput/rollout_tokens_per_second",
}
"""Titles and metrics of the curves, where the run has them."""

SETTINGS = ("policy.path", "reward._target_", "algorithm.advantage._target_", "module.num_generations", "module.learning_rate", "seed")
"""Parameters that are shown first."""


def term_histories(curves: dict[str, Curve]) -> dict[str, TermHistory]:
    """The reward terms among a run's curves (`reward/<term>/mean` and `.../within_group_std`)."""
    histories = {}
    for name, curve in curves.items():
        parts = name.split("/")
        if parts[0] == "reward" and parts[-1] == "mean":
            spread = dict(curves.get("/".join([*parts[:-1], "within_group_std"]), []))
            steps = [step for step, _ in curve]
            histories["/".join(parts[1:-1])] = TermHistory(
                steps, [value for _, value in curve], [spread.get(step, float("nan")) for step in steps]
            )
    return histories


def figures(run: RunData) -> list[tuple[str, str]]:
    """Captions and pictures (as `data:` addresses) of what the run has."""
    drawn: list[tuple[str, Figure]] = []
    if terms := term_histories(run.curves):
        drawn.append(
            ("Reward terms over rollout batches: mean, and the spread within groups that moves the gradient", reward_terms_figure(terms))
        )
    if chosen := {title: run.curves[metric] for title, metric in CURVES.items() if metric in run.curves}:
        drawn.append(("What the policy did meanwhile", curves_figure(chosen)))
    if run.similarities:
        first, last = min(run.similarities), max(run.similarities)
        names = {step: "before training" if step == 0 else f"after {step} rollout batches" for step in (first, last)}
        caption = "Cosines of queries to their documents and to others, on held-out records"
        drawn.append((caption, similarities_figure({name: run.similarities[step] for step, name in names.items()})))
    return [(caption, _data_address(figure)) for caption, figure in drawn]


def _data_address(figure: Figure) -> str:
    """A figure as an SVG inside an address, with letters as shapes: it needs no font, and its names meet no other figure's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render(run: RunData) -> str:
    """The page: figures, scores, and the rationales of every watched text by step with what they earned.

    It has no script and allows none; whatever a policy wrote is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    terms = list(dict.fromkeys(name for rows in run.rationales.values() for row in rows for name in row.earned))
    return environment.get_template(_TEMPLATE).render(
        run=run,
        figures=figures(run),
        terms=terms,
        settings=[(name, run.params[name]) for name in SETTINGS if name in run.params],
        commit=run.tags.get("git.commit", ""),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes the HTML report of a run, whether it is done or not.")
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
        raise SystemExit(f"run_report: {redact(str(error).splitlines()[0])}") from error
    write_text(options.folder / FILE, page)
    log.info("wrote %s", options.folder / FILE)


if __name__ == "__main__":
    main()
