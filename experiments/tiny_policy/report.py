"""Reports on the tiny policy: its loss curve, retrieval with and without rationales, ten rationales on held-out texts.

    python -m experiments.tiny_policy.report [--policy experiments/tiny_policy/weights] [--run-name cold_start]

Writes results.md, and loss.png where the MLflow store has the cold-start run, beside this file.
"""

import argparse
import random
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
from omegaconf import OmegaConf

from src.datamodules.docstrings import collect
from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.offline_tasks import offline_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.rollouts.hf import HFEngine
from src.utils.mlflow_store import default_store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CURVES = {
    "text": "text",
    "query_rationale": "rationale of queries",
    "document_rationale": "rationale of documents",
    "nce": "InfoNCE, text alone",
    "nce_rationale": "InfoNCE with rationale",
    "copying": "copying",
}


def joined_history(client: mlflow.MlflowClient, runs: list[str], metric: str) -> list[tuple[int, float]]:
    """Returns steps and values over runs that resumed one another; a later run's values replace an earlier's."""
    values: dict[int, float] = {}
    for run in runs:
        values |= {point.step: point.value for point in client.get_metric_history(run, metric)}
    return sorted(values.items())


def loss_curve(tracking_uri: str, run_name: str, path: Path) -> str:
    """Draws the losses of the runs of that name, resumed ones joined; returns a line about them."""
    mlflow.set_tracking_uri(tracking_uri)
    runs = mlflow.search_runs(search_all_experiments=True, filter_string=f"attributes.run_name = '{run_name}'", order_by=["start_time ASC"])
    if runs.empty:
        return f"no run named {run_name!r} in {tracking_uri}: the loss curve was left as it is"
    plt.switch_backend("Agg")
    client = mlflow.MlflowClient()
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), dpi=120, layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        for split, style in (("train", {"linewidth": 0.8}), ("val", {"marker": "o", "markersize": 3})):
            points = joined_history(client, list(runs["run_id"]), f"{split}/{name}")
            points = [point for point in points if point[0] >= 250 or name == "copying"]  # before that it only copies
            axis.plot([step for step, _ in points], [value for _, value in points], label=split, **style)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("steps")
    figure.supylabel("nats")
    figure.savefig(path)
    return f"{len(runs)} runs named {run_name!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default=str(HERE / "weights"))
    parser.add_argument("--run-name", default="cold_start")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    packages = OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")
    cache = ROOT / "data" / "cache"
    print(loss_curve(arguments.tracking_uri, arguments.run_name, arguments.output / "loss.png"))

    policy, settings = load_policy(arguments.policy)
    engine = HFEngine(settings.max_new_tokens)
    encoders = {
        "without rationales": RationaleEncoder(policy, settings, engine, rationale=False),
        "with rationales, greedy": RationaleEncoder(policy, settings, engine),
        "with rationales, sampled at 1": RationaleEncoder(policy, settings, engine, temperature=1.0),
    }
    tasks = offline_tasks(packages.test, cache, size="large")
    lines = [f"Offline tasks on {', '.join(packages.test)} (none of it trained on), main scores in %:", ""]
    for row, (name, encoder) in enumerate(encoders.items()):
        scores = run_tasks(encoder, tasks, None, f"tiny-{row}")
        columns = [*scores.tasks, "average"]
        if row == 0:
            lines += [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.2f}' for value in [*scores.tasks.values(), scores.average])} |")

    docs = random.Random(7).sample(collect(packages.test, cache), 10)
    _, rationales = encoders["with rationales, greedy"].explain([doc.body[:320] for doc in docs])
    lines += [
        "",
        "Ten greedy rationales on held-out documents, drawn by a fixed seed:",
        "",
        "| document | rationale | its summary line |",
        "| --- | --- | --- |",
    ]
    for doc, rationale in zip(docs, rationales, strict=True):
        cells = (doc.body[:200] + ("…" if len(doc.body) > 200 else ""), rationale, doc.summary)
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |")
    page = "\n".join(lines) + "\n"
    (arguments.output / "results.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
