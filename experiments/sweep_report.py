"""Reports of sweeps: sweep.md (a table, mean and spread over seeds), sweep.png (a heat map), and the same in MLflow.

A sweep calls `report_sweep` when it ends (hydra.callbacks.sweep.report). Again, at any time, by its command line:

python -m experiments.sweep_report "hparams_search=lambdas reward=paper" --output experiments/lambdas/paper
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mlflow.tracking import MlflowClient

from src.utils.mlflow_store import default_store
from src.utils.sweeps import ERROR, KEYS, REPORT, SWEEP, outcomes, rounded, search, short

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SEED = "seed"
"""The swept key that is averaged over."""
DPI = 120


@dataclass(frozen=True)
class Sweep:
    """A sweep as read from MLflow.

    Attributes:
        run_id, name: of the parent run.
        keys: swept, without the seed.
        metrics: of the report; the first decides which point is best.
        direction: of the first metric, `maximize` or `minimize`.
        curves: metrics that are drawn over steps.
        points: a row per finished point: `run_id`, the swept values as text, the last value of each metric (NaN: never logged).
        failures: (values as text, error) of each point that failed and never finished.
    """

    run_id: str
    name: str
    keys: list[str]
    metrics: list[str]
    direction: str
    curves: list[str]
    points: pd.DataFrame
    failures: list[tuple[str, str]]

    def groups(self) -> pd.DataFrame:
        """Returns points averaged over seeds: index the swept values, sorted; columns (metric, mean | std | count).

        The spread is the sample standard deviation, NaN for a single seed.
        """
        points = self.points.assign(**{key: _ordered(self.points[key]) for key in self.keys})
        keys = self.keys or [pd.Series("all", index=points.index, name="point")]
        return points.groupby(keys, observed=True, sort=True)[self.metrics].agg(["mean", "std", "count"])

    def best(self) -> tuple[dict[str, str], float] | None:
        """Returns values and mean of the best point by the first metric; None if no finished point has logged it."""
        means = self.groups()[(self.metrics[0], "mean")].dropna() if len(self.points) else pd.Series()
        if means.empty:
            return None
        best = means.idxmax() if self.direction == "maximize" else means.idxmin()
        return dict(zip(self.keys, map(str, _as_tuple(best)), strict=False)), float(means[best])


def find_sweep(client: MlflowClient, project: str, name: str | None) -> str:
    """Returns the run id of a project's newest sweep with this id or command; else whose command contains `name`; else of any name.

    Raises:
        ValueError: there is none.
    """
    experiment = client.get_experiment_by_name(project)
    runs = search(client, experiment.experiment_id, **{SWEEP: "%"}) if experiment else []
    names = {run.info.run_id: str(run.info.run_name) for run in runs}
    exact = [run_id for run_id, command in names.items() if name in (run_id, command.removeprefix("sweep "))]
    for run_id in exact + [run_id for run_id, command in names.items() if name is None or name in command]:
        return run_id
    listed = "; ".join(dict.fromkeys(names.values())) or "none"
    raise ValueError(f"no sweep {name or ''!r} in project {project!r} of this MLflow store; there are: {listed}")


def read_sweep(client: MlflowClient, run_id: str, metrics: Sequence[str] = (), curves: Sequence[str] = ()) -> Sweep:
    """Reads the sweep of a parent run; metrics and curves replace those that it names."""
    parent = client.get_run(run_id)
    report = json.loads(parent.data.tags[REPORT])
    report |= {"metrics": list(metrics) or report["metrics"], "curves": list(curves) or report["curves"]}
    keys = json.loads(parent.data.tags[KEYS])
    finished, failed = outcomes(client, parent)
    rows = [
        {"run_id": run.info.run_id, **json.loads(values), **{m: run.data.metrics.get(m, float("nan")) for m in report["metrics"]}}
        for values, run in finished.items()
    ]
    points = pd.DataFrame(rows, columns=["run_id", *keys, *report["metrics"]])
    failures = [(short(json.loads(values)), run.data.tags[ERROR]) for values, run in failed.items()]
    return Sweep(run_id, parent.info.run_name, [key for key in keys if key != SEED], points=points, failures=failures, **report)


def markdown(sweep: Sweep) -> str:
    """Returns the sweep as a page: table, best point, failed points."""
    lines = [f"# {sweep.name}", ""]
    if len(sweep.points):
        lines += ["Last value of each metric; mean ± sample standard deviation over seeds where there are several.", ""]
        lines += ["| " + " | ".join([*sweep.keys, "runs", *sweep.metrics]) + " |"]
        lines += ["| --- |" + " ---: |" * (len(sweep.keys) + len(sweep.metrics))]
        for where, row in sweep.groups().iterrows():
            values = [rounded(str(value)) for value in _as_tuple(where)][: len(sweep.keys)]
            cells = [_cell(row[(metric, "mean")], row[(metric, "std")]) for metric in sweep.metrics]
            runs = int(max(row[(metric, "count")] for metric in sweep.metrics))
            lines.append("| " + " | ".join([*values, str(runs), *cells]) + " |")
    best = sweep.best()
    found = f"{short(best[0])} ({best[1]:.4g})".strip() if best else "not known: no finished point has logged it"
    lines += ["", f"Best by {sweep.metrics[0]} ({sweep.direction}): {found}.", ""]
    lines += [f"- failed: {values}: {error}" for values, error in sweep.failures]
    return "\n".join(lines).rstrip() + "\n"


def write_report(client: MlflowClient, sweep: Sweep, folder: Path | str) -> list[Path]:
    """Writes sweep.md, sweep.png and, if there are curves, curves.png into a folder and the parent run; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, figures = markdown(sweep), {}
    if len(sweep.points):
        figures["sweep.png"] = values_figure(sweep.groups(), sweep.keys, sweep.metrics)
        if sweep.curves:
            figures["curves.png"] = curves_figure(client, sweep)
    for name, figure in figures.items():
        figure.savefig(folder / name)
        page += f"\n![{Path(name).stem}]({name})\n"
    (folder / "sweep.md").write_text(page, encoding="utf-8")
    written = [folder / name for name in ("sweep.md", *figures)]
    for file in written:
        client.log_artifact(sweep.run_id, str(file))
    if best := sweep.best():
        client.log_metric(sweep.run_id, f"best/{sweep.metrics[0]}", best[1])
        client.set_tag(sweep.run_id, "sweep.best", short(best[0]))
    return written


def report_sweep(client: MlflowClient, run_id: str, folder: Path | str) -> None:
    """Writes the report of the sweep of a parent run, and logs where it is and what is best."""
    sweep = read_sweep(client, run_id)
    for file in write_report(client, sweep, folder):
        log.info("sweep: %s", file)
    if best := sweep.best():
        log.info("sweep: best by %s: %s (%.4g)", sweep.metrics[0], short(best[0]), best[1])


# ---- figures


def values_figure(groups: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> Figure:
    """Draws a heat map per metric if the points form a grid; else, as for a search, each metric over each swept key.

    Args:
        groups: see `Sweep.groups`.
        keys: levels of its index; the last goes from left to right, the others (or a single one) from top to bottom.
        metrics: to draw.
    """
    cells = np.prod([groups.index.get_level_values(level).nunique() for level in range(groups.index.nlevels)])
    if cells <= 4 * len(groups):
        return _heat_maps(groups, keys, metrics)
    figure = Figure(figsize=(3.2 * len(keys) + 0.6, 2.8 * len(metrics) + 0.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(metrics), len(keys), squeeze=False, sharey="row")
    for row, metric in enumerate(metrics):
        axes[row, 0].set_ylabel(metric)
        for column, key in enumerate(keys):
            values = groups.index.get_level_values(column).astype(str)
            numbers = pd.to_numeric(pd.Series(values), errors="coerce")
            axes[row, column].plot(numbers if numbers.notna().all() else values, groups[(metric, "mean")], "o", color="#1f5fa8")
            axes[row, column].grid(alpha=0.25)
            axes[-1, column].set_xlabel(key)
    return figure


def _heat_maps(groups: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> Figure:
    grid = len(keys) > 1
    tables = {
        (metric, part): groups[(metric, part)].unstack() if grid else groups[(metric, part)].to_frame("")
        for metric in metrics
        for part in ("mean", "std")
    }
    rows, columns = tables[(metrics[0], "mean")].shape
    figure = Figure(figsize=((1.05 * columns + 2.6) * len(metrics), 0.55 * rows + 1.6), dpi=DPI, layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _heat_map(axis, tables[(metric, "mean")], tables[(metric, "std")])
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel(keys[-1] if grid else "")
        axis.set_ylabel(", ".join(key.rsplit(".", 1)[-1] for key in keys[:-1]) if grid else "".join(keys))
    return figure


def _heat_map(axis: Axes, means: pd.DataFrame, spreads: pd.DataFrame) -> None:
    values = means.to_numpy(dtype=float)
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    axis.set_xticks(range(means.shape[1]), [str(column) for column in means.columns], fontsize=8)
    axis.set_yticks(range(means.shape[0]), [", ".join(map(str, _as_tuple(row))) for row in means.index], fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            text = _cell(value, spreads.to_numpy(dtype=float)[row, column]).replace(" ±", "\n±")
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def curves_figure(client: MlflowClient, sweep: Sweep) -> Figure:
    """Draws a panel per metric over steps: a thin line per run, a thick one for the mean over a point's seeds."""
    labels = [short({key: row[key] for key in sweep.keys}) for _, row in sweep.points.iterrows()]
    points = sweep.points.groupby(pd.Series(labels, index=sweep.points.index), sort=False)
    figure = Figure(figsize=(4.4 * len(sweep.curves), 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(sweep.curves), squeeze=False)[0]
    for axis, metric in zip(axes, sweep.curves, strict=True):
        for colour, (label, point) in zip(colormaps["viridis"](np.linspace(0, 0.9, len(points))), points, strict=True):
            history = {run: {entry.step: entry.value for entry in client.get_metric_history(run, metric)} for run in point["run_id"]}
            runs = pd.DataFrame({run: pd.Series(values) for run, values in history.items()}).sort_index()
            if runs.shape[1] > 1:
                axis.plot(runs.index, runs, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(runs.index, runs.mean(axis=1), color=colour, linewidth=1.8, label=label)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("rollout batch")
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def _as_tuple(index: object) -> tuple[object, ...]:
    return index if isinstance(index, tuple) else (index,)


def _ordered(values: pd.Series) -> pd.Categorical:
    """Returns values as ordered categories: numbers by size, anything else as it comes."""
    different = list(dict.fromkeys(values))
    numbers = pd.to_numeric(pd.Series(different), errors="coerce")
    if numbers.notna().all():
        different = [different[i] for i in numbers.argsort()]
    return pd.Categorical(values, categories=different, ordered=True)


def _cell(mean: float, std: float) -> str:
    """Returns `mean ± spread`, `mean` alone for one seed, `-` for no value."""
    if pd.isna(mean):
        return "-"
    return f"{mean:.4g}" + ("" if pd.isna(std) else f" ± {std:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", help="run id, or part of the name (the command line); default: the newest sweep")
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="replace those that the sweep names; the first decides which point is best"
    )
    parser.add_argument("--curves", nargs="+", default=[], help="metrics to draw over rollout batches")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep_report"))
    parser.add_argument("--project", default="grace")
    parser.add_argument("--tracking-uri", default=default_store())
    arguments = parser.parse_args()
    client = MlflowClient(arguments.tracking_uri)
    try:
        run_id = find_sweep(client, arguments.project, arguments.sweep)
    except ValueError as error:
        raise SystemExit(f"sweep_report: {error}") from error
    files = write_report(client, read_sweep(client, run_id, arguments.metrics, arguments.curves), arguments.output)
    print(files[0].read_text(encoding="utf-8"))
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
