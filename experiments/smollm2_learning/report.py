"""Reads the runs of the study from MLflow; writes results.md and learning.png beside this file.

python -m experiments.smollm2_learning.report [--tracking-uri sqlite:///mlflow.db] [--output FOLDER]
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import mlflow
import pandas as pd

from src.utils.mlflow_store import default_store

HERE = Path(__file__).parent
ARMS = {
    "protected": "GRACE, both parts, KL to the start",
    "both": "GRACE, both parts",
    "truescale": "GRACE, both, true scale",
    "pathwise": "GRACE, pathwise part alone",
    "published": "GRACE, published form",
    "cl": "Contrastive learning",
    "simcse": "SimCSE",
}
"""The runs' names, in the table's order."""

SCORES = {
    "DocstringRetrieval": "docstrings nDCG@10",
    "docstrings/average": "docstrings average",
    "WordNetRetrieval": "everyday nDCG@10",
    "WordNetSimilarity": "everyday STS",
    "everyday/average": "everyday average",
    "average": "average of 9",
}
TASKS = [
    *("DocstringRetrieval", "DocstringReranking", "DocstringClassification", "DocstringClustering", "DocstringPairs"),
    *("WordNetRetrieval", "WordNetSimilarity", "WordNetClassification", "WordNetPairs"),
]
ROWS = {"without": {"grace": "grace_without_rationales", "cl": "cl", "simcse": "simcse"}}
ROWS["with"] = {"grace": "grace", "cl": "cl_reasoning", "simcse": "simcse_reasoning"}
BASES = {"without": "base", "with": "base_reasoning"}
DIAGNOSTICS = {
    "update/score_function_grad_norm": "norm, score-function part",
    "update/pathwise_grad_norm": "norm, pathwise part",
    "update/gradient_parts_cosine": "cosine of the two",
    "rollout/unrelated_similarity": "similarity of unrelated texts",
    "update/entropy": "entropy (nats a token)",
    "kl/from_start": "KL from the start (nats a token)",
    "rollout/distinct_rationales": "distinct rationales",
}


def finished(project: str) -> pd.DataFrame:
    """Returns the last finished run of each arm and seed, with the columns `arm` and `seed`.

    Raises:
        SystemExit: there is none.
    """
    runs = mlflow.search_runs(experiment_names=[project])
    runs = runs[runs["status"] == "FINISHED"] if len(runs) else runs
    if runs.empty:
        raise SystemExit(
            f"no finished runs of project {project!r} in {mlflow.get_tracking_uri()}; README.md has the command that makes them"
        )
    runs = runs.rename(columns={"tags.mlflow.runName": "arm", "params.seed": "seed"})
    return runs.sort_values("start_time").drop_duplicates(["arm", "seed"], keep="last").sort_values(["arm", "seed"])


def scores(group: pd.DataFrame, row: str, task: str) -> list[float]:
    """Returns the scores of a row of the final report in percent, a run each."""
    column = f"metrics.test/{row}/{task}"
    return [100 * value for value in group[column].dropna()] if column in group else []


def cell(values: list[float]) -> str:
    """Returns mean and sample standard deviation."""
    if not values:
        return "-"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def method_of(arm: str) -> str:
    return arm if arm in ("cl", "simcse") else "grace"


def score_table(runs: pd.DataFrame, how: str) -> str:
    """Returns the table of all arms, scored with rationales or without, beside the starting policy."""
    lines = [["", "seeds", *SCORES.values()]]
    base = {"without": "Base", "with": "Base + reasoning"}[how]
    lines.append([base, "-", *(cell(scores(runs.iloc[:1], BASES[how], task)) for task in SCORES)])
    for arm, title in ARMS.items():
        group = runs[runs["arm"] == arm]
        if len(group):
            row = ROWS[how][method_of(arm)]
            lines.append([title, str(len(group)), *(cell(scores(group, row, task)) for task in SCORES)])
    return markdown(lines)


def gains(runs: pd.DataFrame, how: str, tasks: dict[str, str]) -> str:
    """Returns by arm and task the gain over the starting policy in each seed, in points; `tasks` names the columns."""
    lines = [["", *tasks.values()]]
    for arm, title in ARMS.items():
        group = runs[runs["arm"] == arm]
        if not len(group):
            continue
        found = []
        for task in tasks:
            after, before = scores(group, ROWS[how][method_of(arm)], task), scores(group, BASES[how], task)
            found.append(", ".join(f"{a - b:+.1f}" for a, b in zip(after, before, strict=True)) or "-")
        lines.append([title, *found])
    return markdown(lines)


def diagnostics(runs: pd.DataFrame) -> str:
    """Returns the first and the last value of what was logged in training, means over seeds."""
    client = mlflow.MlflowClient()
    lines = [["", *DIAGNOSTICS.values()]]
    for arm, title in ARMS.items():
        group = runs[(runs["arm"] == arm)]
        if not len(group) or method_of(arm) != "grace":
            continue
        found = []
        for metric in DIAGNOSTICS:
            series = [sorted((p.step, p.value) for p in client.get_metric_history(run, metric)) for run in group["run_id"]]
            series = [points for points in series if points]
            ends = [f"{fmean(points[place][1] for points in series):.3g}" for place in (0, -1)] if series else []
            found.append(" -> ".join(ends) or "-")
        lines.append([title, *found])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Draws the gain over the starting policy of each arm: a bar its mean, a dot a seed."""
    plt.switch_backend("Agg")
    shown = {task: SCORES[task] for task in ("DocstringRetrieval", "docstrings/average", "WordNetRetrieval", "everyday/average")}
    arms = [arm for arm in ARMS if (runs["arm"] == arm).any()]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.6), dpi=120, layout="constrained", sharey=True)
    for axis, (task, title) in zip(axes, shown.items(), strict=True):
        for place, arm in enumerate(arms):
            group = runs[runs["arm"] == arm]
            for offset, (how, colour) in enumerate((("with", "tab:blue"), ("without", "tab:orange"))):
                after, before = scores(group, ROWS[how][method_of(arm)], task), scores(group, BASES[how], task)
                values = [a - b for a, b in zip(after, before, strict=True)]
                if values:
                    x = place + 0.38 * offset - 0.19
                    axis.bar(x, fmean(values), width=0.36, color=colour, alpha=0.5, label=f"{how} rationales" if place == 0 else None)
                    axis.plot([x] * len(values), values, ".", color="black", markersize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(arms)), [ARMS[arm].replace("GRACE, ", "").replace("Contrastive learning", "CL") for arm in arms])
        plt.setp(axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("gain over the start, points")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="smollm2_learning")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    mlflow.set_tracking_uri(arguments.tracking_uri)
    runs = finished(arguments.project)
    page = "\n\n".join(
        [
            "Scored with rationales, written greedily, %, mean ± standard deviation over seeds:",
            score_table(runs, "with"),
            "Scored without rationales:",
            score_table(runs, "without"),
            "Gain over the start in each seed, in points, with rationales:",
            gains(runs, "with", SCORES),
            "The same without:",
            gains(runs, "without", SCORES),
            "Every task, with rationales:",
            gains(runs, "with", {task: task for task in TASKS}),
            "Every task, without:",
            gains(runs, "without", {task: task for task in TASKS}),
            "First batch -> last batch, means over seeds (gradients: of the batches that measure them):",
            diagnostics(runs),
            "![gain over the start](learning.png)\n",
        ]
    )
    (arguments.output / "results.md").write_text(page, encoding="utf-8")
    draw(runs, arguments.output / "learning.png")
    print(page)


if __name__ == "__main__":
    main()
