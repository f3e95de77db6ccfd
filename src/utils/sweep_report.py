"""A sweep read from MLflow, and what it comes to: a table with mean and spread over seeds, figures, the best point."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from src.utils.sweep_plots import curves_figure, values_figure
from src.utils.sweep_store import ERROR, FOLDER, KEYS, PARENT, REPORT, RESULT, SWEEP, VALUES, rounded, search, short

SEED = "seed"
"""What is averaged over where it is swept."""


@dataclass(frozen=True)
class Sweep:
    """What MLflow holds of a sweep.

    Attributes:
        run_id, name: of the parent run.
        keys: what was swept, without the seed.
        metrics: that the report shows; the first one decides which point is best.
        direction: of that one, `maximize` or `minimize`.
        curves: metrics that are drawn over steps.
        points: a row a finished point: `run_id`, the swept values as text, the last value of each metric (NaN: never logged).
        failures: `folder`, `values` as text and `error` of the last attempt at each point that failed and never finished.
    """

    run_id: str
    name: str
    keys: list[str]
    metrics: list[str]
    direction: str
    curves: list[str]
    points: pd.DataFrame
    failures: list[dict[str, str]]

    def groups(self) -> pd.DataFrame:
        """A row a point whatever its seed: index the swept values, columns (metric, mean | std | count); in the order of the values.

        The spread is the sample standard deviation over seeds, NaN for one.
        """
        points = self.points.assign(**{key: _ordered(self.points[key]) for key in self.keys})
        keys = self.keys or [pd.Series("all", index=points.index, name="point")]
        return points.groupby(keys, observed=True, sort=True)[self.metrics].agg(["mean", "std", "count"])

    def best(self) -> tuple[dict[str, str], float] | None:
        """Values and mean of the point that is best by the first metric; None where no finished point has logged it."""
        means = self.groups()[(self.metrics[0], "mean")].dropna() if len(self.points) else pd.Series()
        if means.empty:
            return None
        where = means.idxmax() if self.direction == "maximize" else means.idxmin()
        values = where if isinstance(where, tuple) else (where,)
        return dict(zip(self.keys, map(str, values), strict=False)), float(means[where])


def _ordered(values: pd.Series) -> pd.Categorical:
    """Values as categories: numbers by size, anything else as it comes."""
    different = list(dict.fromkeys(values))
    numbers = pd.to_numeric(pd.Series(different), errors="coerce")
    if numbers.notna().all():
        different = [different[i] for i in numbers.argsort()]
    return pd.Categorical(values, categories=different, ordered=True)


def find_sweep(client: MlflowClient, project: str, name: str | None) -> str:
    """The id of a project's sweep: of the newest whose id or command this is, else whose command contains it; without one, the newest.

    Raises:
        ValueError: there is none.
    """
    experiment = client.get_experiment_by_name(project)
    runs = search(client, experiment.experiment_id, **{SWEEP: "%"}) if experiment else []
    names = {run.info.run_id: str(run.info.run_name) for run in runs}
    exact = [run_id for run_id, own in names.items() if name in (run_id, own.removeprefix("sweep "))]
    for run_id in exact + [run_id for run_id, own in names.items() if name is None or name in own]:
        return run_id
    listed = "; ".join(dict.fromkeys(names.values())) or "none"
    raise ValueError(f"no sweep {name or ''!r} in project {project!r} of this MLflow store; there are: {listed}")


def read_sweep(client: MlflowClient, run_id: str, metrics: Sequence[str] = (), curves: Sequence[str] = ()) -> Sweep:
    """The sweep whose parent run this is, with its own metrics and curves or with those that are named."""
    parent = client.get_run(run_id)
    report: dict[str, Any] = json.loads(parent.data.tags[REPORT])
    report |= {"metrics": list(metrics) or report["metrics"], "curves": list(curves) or report["curves"]}
    keys = json.loads(parent.data.tags[KEYS])
    finished: dict[str, Run] = {}  # by the swept values; the last attempt counts
    failed: dict[str, Run] = {}
    for run in search(client, parent.info.experiment_id, **{PARENT: run_id}):
        for tag, runs in ((RESULT, finished), (ERROR, failed)):
            if tag in run.data.tags:
                runs.setdefault(run.data.tags[VALUES], run)
    columns = ["run_id", *keys, *report["metrics"]]
    rows = [
        {"run_id": run.info.run_id, **json.loads(values), **{m: run.data.metrics.get(m, float("nan")) for m in report["metrics"]}}
        for values, run in reversed(finished.items())
    ]
    failures = [
        {"folder": run.data.tags[FOLDER], "values": short(json.loads(values)), "error": run.data.tags[ERROR]}
        for values, run in reversed(failed.items())
        if values not in finished
    ]
    points = pd.DataFrame(rows, columns=columns)
    return Sweep(run_id, parent.info.run_name, [key for key in keys if key != SEED], points=points, failures=failures, **report)


def cell(mean: float, std: float) -> str:
    """`mean ± spread`, `mean` alone of one seed, `-` where there is nothing."""
    if pd.isna(mean):
        return "-"
    return f"{mean:.4g}" + ("" if pd.isna(std) else f" ± {std:.2g}")


def markdown(sweep: Sweep) -> str:
    """The sweep as a page: table, best point, failed points."""
    lines = [f"# {sweep.name}", ""]
    if len(sweep.points):
        lines += ["Last value of each metric; mean ± sample standard deviation over seeds where there are several.", ""]
        lines += [
            "| " + " | ".join([*sweep.keys, "runs", *sweep.metrics]) + " |",
            "| --- |" + " ---: |" * (len(sweep.keys) + len(sweep.metrics)),
        ]
        for where, row in sweep.groups().iterrows():
            values = [rounded(str(value)) for value in (where if isinstance(where, tuple) else (where,))][: len(sweep.keys)]
            cells = [cell(row[(metric, "mean")], row[(metric, "std")]) for metric in sweep.metrics]
            runs = int(max(row[(metric, "count")] for metric in sweep.metrics))
            lines.append("| " + " | ".join([*values, str(runs), *cells]) + " |")
    best = sweep.best()
    found = f"{short(best[0])} ({best[1]:.4g})".strip() if best else "not known: no finished point has logged it"
    lines += ["", f"Best by {sweep.metrics[0]} ({sweep.direction}): {found}."]
    lines += ["", *(f"- failed: {failure['values']}: {failure['error']}" for failure in sweep.failures)]
    return "\n".join(lines).rstrip() + "\n"


def write_report(client: MlflowClient, sweep: Sweep, folder: Path | str) -> list[Path]:
    """sweep.md, sweep.png and, if curves are asked for, curves.png: in a folder, and as artifacts of the parent run."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "sweep.md"]
    page = markdown(sweep)
    figures = {}
    if len(sweep.points):
        figures["sweep.png"] = values_figure(sweep.groups(), sweep.keys, sweep.metrics)
        if sweep.curves:
            figures["curves.png"] = curves_figure(histories(client, sweep), sweep.curves)
    for name, figure in figures.items():
        figure.savefig(folder / name)
        written.append(folder / name)
        page += f"\n![{Path(name).stem}]({name})\n"
    written[0].write_text(page, encoding="utf-8")
    for file in written:
        client.log_artifact(sweep.run_id, str(file))
    best = sweep.best()
    if best:
        client.log_metric(sweep.run_id, f"best/{sweep.metrics[0]}", best[1])
        client.set_tag(sweep.run_id, "sweep.best", short(best[0]))
    return written


def histories(client: MlflowClient, sweep: Sweep) -> dict[str, dict[str, pd.DataFrame]]:
    """For each of `sweep.curves`, by point whatever its seed: steps (index) by runs (columns)."""
    points = sweep.points.assign(label=[short({key: row[key] for key in sweep.keys}) for _, row in sweep.points.iterrows()])
    return {
        metric: {
            label: pd.DataFrame(
                {run: pd.Series({entry.step: entry.value for entry in client.get_metric_history(run, metric)}) for run in group["run_id"]}
            ).sort_index()
            for label, group in points.groupby("label", sort=False)
        }
        for metric in sweep.curves
    }
