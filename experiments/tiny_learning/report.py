"""Reads the runs of the study from MLflow; writes results.md and curves.png beside this file.

python -m experiments.tiny_learning.report [--project tiny_learning] [--tracking-uri sqlite:///mlflow.db]
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import mlflow
import pandas as pd

from src.utils.mlflow_store import default_store

HERE = Path(__file__).parent
SCORES = {"DocstringRetrieval": "retrieval nDCG@10", "average": "average of 5 tasks"}
DIAGNOSTICS = {
    "rollout/unrelated_similarity": "similarity of unrelated texts",
    "rollout/distinct_rationales": "distinct rationales",
    "reward/total/within_group_std": "within-group std of the reward",
    "rollout/rationale_length": "rationale length",
    "rollout/truncated_fraction": "truncated",
    "kl/from_start": "KL from the start (nats a token)",
}


def last_runs(project: str, unfinished: bool) -> pd.DataFrame:
    """The last run of every (name, seed), of those that finished or of all."""
    runs = mlflow.search_runs(experiment_names=[project])
    if not unfinished:
        runs = runs[runs["status"] == "FINISHED"]
    if runs.empty:
        raise SystemExit(
            f"no finished runs of project {project!r} in {mlflow.get_tracking_uri()}; see README.md for the command that makes them"
        )
    runs = runs.sort_values("start_time").drop_duplicates(["tags.mlflow.runName", "params.seed"], keep="last")
    return runs.rename(columns={"tags.mlflow.runName": "form", "params.seed": "seed"}).sort_values(["form", "seed"])


def mean_and_spread(values: list[float], scale: float = 1.0) -> str:
    """`mean ± sample standard deviation`."""
    spread = f" ± {scale * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):.2f}{spread}"


def validation_rows(runs: pd.DataFrame) -> list[list[str]]:
    """What a run without a final report has: validation scores before the first batch and after the last."""
    client, rows = mlflow.MlflowClient(), []
    for _, run in runs.iterrows():
        cells = []
        for task in SCORES:
            points = [value for _, value in sorted(history(client, run["run_id"], f"mteb/{task}").items())]
            cells.append(f"{100 * points[0]:.2f} -> {100 * points[-1]:.2f}" if points else "-")
        rows.append([run["form"], run["seed"], *cells])
    return rows


def score_rows(runs: pd.DataFrame) -> list[list[str]]:
    """Base and Base + reasoning (the same in every run: greedy), then the forms."""
    rows = [
        [label, "-"] + [f"{100 * runs[f'metrics.test/{slug}/{task}'].iloc[0]:.2f}" for task in SCORES]
        for slug, label in (("base", "Base"), ("base_reasoning", "Base + reasoning"))
    ]
    for form, group in runs.groupby("form"):
        rows.append(
            [f"GRACE {form}", str(len(group))] + [mean_and_spread(list(group[f"metrics.test/grace/{task}"]), 100) for task in SCORES]
        )
    return rows


def history(client: mlflow.MlflowClient, run_id: str, metric: str) -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run_id, metric)}


def diagnostic_rows(runs: pd.DataFrame, last: int = 10) -> list[list[str]]:
    """Means over the first and the last batches of each run, then over seeds."""
    client = mlflow.MlflowClient()
    rows = []
    for form, group in runs.groupby("form"):
        cells = []
        for metric in DIAGNOSTICS:
            series = [values for run in group["run_id"] if (values := history(client, run, metric))]
            begin = [fmean(value for step, value in values.items() if step < min(values) + last) for values in series]
            end = [fmean(value for step, value in values.items() if step > max(values) - last) for values in series]
            cells.append(f"{fmean(begin):.2f} -> {fmean(end):.2f}" if series else "-")
        rows.append([f"GRACE {form}", *cells])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curves(runs: pd.DataFrame, path: Path) -> None:
    """Validation average and similarity of unrelated texts over rollout batches: a thin line a run, a thick one a form."""
    plt.switch_backend("Agg")
    client = mlflow.MlflowClient()
    panels = {
        "mteb/average": "validation average",
        "rollout/unrelated_similarity": "similarity of unrelated texts",
        "rollout/distinct_rationales": "share of distinct rationales",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), dpi=120, layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for colour, (form, group) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], runs.groupby("form"), strict=False):
            series = pd.DataFrame({run: history(client, run, metric) for run in group["run_id"]}).sort_index()
            axis.plot(series.index, series, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(series.index, series.mean(axis=1), color=colour, linewidth=2, label=form)
        axis.set_title(title)
        axis.set_xlabel("rollout batches")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="tiny_learning")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--unfinished", action="store_true", help="runs that were cut off, too")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    mlflow.set_tracking_uri(arguments.tracking_uri)
    runs = last_runs(arguments.project, arguments.unfinished)
    scored = "metrics.test/grace/average" in runs
    page = "\n\n".join(
        [
            "Held-out tasks, %, mean ± standard deviation over seeds:" if scored else "Validation tasks, %, first -> last:",
            table(["", "seeds" if scored else "seed", *SCORES.values()], score_rows(runs) if scored else validation_rows(runs)),
            "First ten -> last ten rollout batches, means over seeds:",
            table(["", *DIAGNOSTICS.values()], diagnostic_rows(runs)),
            "![curves](curves.png)\n",
        ]
    )
    (arguments.output / "results.md").write_text(page, encoding="utf-8")
    curves(runs, arguments.output / "curves.png")
    print(page)


if __name__ == "__main__":
    main()
