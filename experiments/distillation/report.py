"""Reads the runs of the study from MLflow; writes results.md and distillation.png beside this file.

python -m experiments.distillation.report [--tracking-uri sqlite:///mlflow.db] [--output FOLDER]
"""

import argparse
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import mlflow
import pandas as pd

from experiments.smollm2_learning.report import SCORES, cell, finished, markdown, scores
from src.utils.mlflow_store import default_store

HERE = Path(__file__).parent
ROWS = {
    "untrained, without rationales": ("taught", "base"),
    "untrained, with": ("taught", "base_reasoning"),
    "GRACE, without rationales": ("distilled", "base"),
    "GRACE, with": ("distilled", "base_reasoning"),
    "GRACE and distilled, **without**": ("distilled", "grace_without_rationales"),
    "GRACE and distilled, with": ("distilled", "grace"),
}
"""By title, the run and the row of its final report: the distillation starts from what GRACE exported."""


def survival(runs: dict[str, pd.DataFrame], task: str) -> list[float]:
    """Returns, a seed each, the share of the rationales' gain over plain GRACE that distilled embeddings have without writing."""
    plain, written, distilled = (scores(runs["distilled"], row, task) for row in ("base", "base_reasoning", "grace_without_rationales"))
    return [(after - before) / (most - before) for before, most, after in zip(plain, written, distilled, strict=True)]


def draw(runs: dict[str, pd.DataFrame], path: Path) -> None:
    """Draws the scores of each row: a bar its mean, a dot a seed."""
    plt.switch_backend("Agg")
    shown = ("DocstringRetrieval", "WordNetRetrieval", "average")
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.8), dpi=120, layout="constrained")
    for axis, task in zip(axes, shown, strict=True):
        for place, (title, (run, row)) in enumerate(ROWS.items()):
            values = scores(runs[run], row, task)
            axis.bar(place, fmean(values), color="tab:orange" if "without" in title else "tab:blue", alpha=0.5)
            axis.plot([place] * len(values), values, ".", color="black", markersize=4)
        axis.set_xticks(range(len(ROWS)), [title.replace("*", "") for title in ROWS])
        plt.setp(axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        axis.set_title(SCORES[task])
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("main score, %")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--taught", default="smollm2_learning", help="project of the runs that are distilled")
    parser.add_argument("--project", default="distillation")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--output", type=Path, default=HERE)
    a = parser.parse_args()
    mlflow.set_tracking_uri(a.tracking_uri)
    taught, distilled = finished(a.taught), finished(a.project)
    runs = {"taught": taught[(taught["arm"] == "protected") & taught["seed"].isin(distilled["seed"])], "distilled": distilled}
    table = [["", "seeds", *SCORES.values()]]
    table += [[title, str(len(runs[run])), *(cell(scores(runs[run], row, task)) for task in SCORES)] for title, (run, row) in ROWS.items()]
    kept = [["", *SCORES.values()], ["share of the rationales' gain", *(cell([100 * x for x in survival(runs, task)]) for task in SCORES)]]
    by_seed = [["seed", *SCORES.values()]]
    for seed, group in distilled.groupby("seed"):
        cells = (
            f"{scores(group, 'base_reasoning', task)[0]:.1f} -> {scores(group, 'grace_without_rationales', task)[0]:.1f}" for task in SCORES
        )
        by_seed.append([str(seed), *cells])
    page = "\n\n".join(
        [
            "%, mean ± standard deviation over seeds:",
            markdown(table),
            "What distilled embeddings without a rationale have of what rationales gave GRACE, %:",
            markdown(kept),
            "GRACE with rationales -> distilled and without, seed by seed:",
            markdown(by_seed),
            "![scores](distillation.png)\n",
        ]
    )
    (a.output / "results.md").write_text(page, encoding="utf-8")
    draw(runs, a.output / "distillation.png")
    print(page)


if __name__ == "__main__":
    main()
