"""Figures of sweeps. Pure functions from tables to matplotlib figures, without pyplot and so without global state."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 120


def values_figure(groups: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> Figure:
    """A heat map for each metric where the points make a grid; else, as for a search, the metric over each swept key.

    Args:
        groups: index the swept values, columns (metric, mean | std | count).
        keys: what the index holds; the last is drawn from left to right, the others (or a single one) from top to bottom.
        metrics: to draw, a row of panels each.
    """
    places = int(np.prod([groups.index.get_level_values(level).nunique() for level in range(groups.index.nlevels)]))
    if places <= 4 * len(groups):
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
    tables = {metric: _as_grid(groups[metric]) for metric in metrics}
    rows, columns = next(iter(tables.values()))[0].shape
    figure = Figure(figsize=((1.05 * columns + 2.6) * len(metrics), 0.55 * rows + 1.6), dpi=DPI, layout="constrained")
    for axis, (metric, (means, spreads)) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], tables.items(), strict=True):
        _heat_map(axis, means, spreads)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel(keys[-1] if len(keys) > 1 else "")
        axis.set_ylabel(", ".join(key.rsplit(".", 1)[-1] for key in keys[:-1]) if len(keys) > 1 else "".join(keys))
    return figure


def _as_grid(metric: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means and spreads of a metric with the last swept key as columns and the rest as rows; a single key as rows."""
    if metric.index.nlevels == 1:
        return metric[["mean"]].set_axis([""], axis=1), metric[["std"]].set_axis([""], axis=1)
    return metric["mean"].unstack(), metric["std"].unstack()


def _heat_map(axis: Axes, means: pd.DataFrame, spreads: pd.DataFrame) -> None:
    values = means.to_numpy(dtype=float)
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    axis.set_xticks(range(means.shape[1]), [str(column) for column in means.columns], fontsize=8)
    labels = [", ".join(map(str, row)) if isinstance(row, tuple) else str(row) for row in means.index]
    axis.set_yticks(range(means.shape[0]), labels, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        spread = spreads.to_numpy(dtype=float)[row, column]
        text = f"{value:.4g}" + ("" if np.isnan(spread) else f"\n± {spread:.2g}")
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def curves_figure(histories: Mapping[str, Mapping[str, pd.DataFrame]], metrics: Sequence[str]) -> Figure:
    """A panel a metric over steps: a thin line a run, a thick one the mean over a point's seeds.

    Args:
        histories: metric -> point -> steps (index) by runs (columns).
        metrics: those of it to draw.
    """
    figure = Figure(figsize=(4.4 * len(metrics), 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(histories[metric])))
        for colour, (label, runs) in zip(colours, histories[metric].items(), strict=True):
            if runs.shape[1] > 1:
                axis.plot(runs.index, runs, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(runs.index, runs.mean(axis=1), color=colour, linewidth=1.8, label=label)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("rollout batch")
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure
