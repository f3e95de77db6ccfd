"""A run as one HTML page without scripts, that needs no other file."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from src.callbacks.html_report.data import RunData
from src.utils.plots import Curve, TermHistory, curves_figure, reward_terms_figure, similarities_figure

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


def render(run: RunData) -> str:
    """Returns the page: figures, scores, and the rationales of every text by step with their rewards; all text is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja").render(
        run=run,
        figures=figures(run),
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
