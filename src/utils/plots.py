"""Figures: pure functions from numbers to matplotlib figures, without pyplot and its global state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 120

Similarities = Mapping[str, Sequence[float]]
"""Cosines by kind of pair."""

Curve = Sequence[tuple[int, float]]
"""A metric: (rollout batch, value), in order."""

_MEAN, _SPREAD = "#1f5fa8", "#c8511b"
_ROWS = ("#9aa5b1", "#5b8db8", "#c8511b", "#4b9a6b", "#7d5ba6")


@dataclass
class TermHistory:
    """One reward term over rollout batches.

    Attributes:
        steps: rollout batch of each entry.
        mean: over all rollouts of the batch.
        within_group_std: mean over groups of the standard deviation over a group's rollouts.
    """

    steps: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    within_group_std: list[float] = field(default_factory=list)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns at each place the mean of the last `window` values (of fewer at the start)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def reward_terms_figure(history: Mapping[str, TermHistory], weights: Mapping[str, float] | None = None) -> Figure:
    """Draws a column per reward term: its mean above, its spread within groups, which moves the gradient, below.

    Args:
        history: by term; `total` is drawn last.
        weights: of the terms, for the titles.

    Raises:
        ValueError: no term.
    """
    if not history:
        raise ValueError("no reward terms to draw: no rollout batch was recorded")
    names = sorted(history, key=lambda name: name == "total")
    figure = Figure(figsize=(2.7 * len(names) + 0.6, 4.8), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        term = history[name]
        for axis, values, colour in ((axes[0, column], term.mean, _MEAN), (axes[1, column], term.within_group_std, _SPREAD)):
            _draw_curve(axis, term.steps, values, colour)
        axes[1, column].set_ylim(0.0, max(1e-3, 1.05 * max(term.within_group_std, default=0.0)))  # rounding is no spread
        weight = (weights or {}).get(name)
        suffix = "" if weight is None else f" (weight {weight:g})" if weight else " (weight 0: only watched)"
        axes[0, column].set_title(f"{name}{suffix}", fontsize=10)
        axes[1, column].set_xlabel("rollout batch")
    axes[0, 0].set_ylabel("mean")
    axes[1, 0].set_ylabel("std within groups")
    axes[0, -1].legend(fontsize=8, frameon=False)
    axes[1, -1].legend(fontsize=8, frameon=False)
    figure.suptitle("Reward terms (before weighting) and their weighted total", fontsize=12)
    return figure


def scores_figure(rows: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Draws grouped bars: a group per category, a bar per row of the table; scores are fractions, shown in percent.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no scores to draw")
    categories = list(dict.fromkeys(category for scores in rows.values() for category in scores))
    figure = Figure(figsize=(1.6 * len(categories) + 2.0, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(rows)
    for i, (row, scores) in enumerate(rows.items()):
        places = [c + (i - (len(rows) - 1) / 2) * width for c in range(len(categories))]
        heights = [100 * scores.get(category, math.nan) for category in categories]
        bars = axis.bar(places, heights, width * 0.95, label=row, color=_ROWS[i % len(_ROWS)])
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axis.set_xticks(range(len(categories)), categories, fontsize=9)
    axis.set_ylabel("main score (%)")
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(rows), fontsize=8, frameon=False)
    return figure


def similarities_figure(groups: Mapping[str, Similarities]) -> Figure:
    """Draws a panel per group (before training, after it) with a histogram of unit area per kind of pair.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("no similarities to draw")
    figure = Figure(figsize=(3.9 * len(groups) + 0.4, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    every = [value for kinds in groups.values() for values in kinds.values() for value in values]
    low, high = min(every), max(every)
    width = max((high - low) / 30, 1e-3)
    edges = [low + i * width for i in range(int((high - low) / width) + 2)]
    colours = dict(zip(dict.fromkeys(kind for kinds in groups.values() for kind in kinds), _ROWS[2:] + _ROWS, strict=False))
    for axis, (name, kinds) in zip(axes, groups.items(), strict=True):
        for kind, values in kinds.items():
            mean = sum(values) / len(values)
            label = f"{kind} ({len(values)} pairs, mean {mean:.2f})"
            axis.hist(values, bins=edges, density=True, histtype="stepfilled", alpha=0.35, color=colours[kind], label=label)
            axis.axvline(mean, color=colours[kind], linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("cosine")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    return figure


def curves_figure(curves: Mapping[str, Curve], columns: int = 4) -> Figure:
    """Draws small multiples of metrics over rollout batches, long ones with a running mean.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise ValueError("no curves to draw")
    rows, columns = -(-len(curves) // columns), min(columns, len(curves))
    figure = Figure(figsize=(2.7 * columns + 0.4, 2.1 * rows + 0.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        _draw_curve(axis, [step for step, _ in curve], [value for _, value in curve], _MEAN)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    return figure


def _draw_curve(axis: Axes, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    """Draws a value per rollout batch and, of ten batches or more, the running mean."""
    window = max(1, len(values) // 10)
    marker = "o" if len(values) < 10 else ""  # a single point is no line
    faint = 0.35 if window > 1 else 1.0
    axis.plot(steps, values, color=colour, alpha=faint, linewidth=1.0, marker=marker, markersize=3, label="rollout batch")
    if window > 1:
        axis.plot(steps, running_mean(values, window), color=colour, linewidth=1.9, label=f"running mean of {window}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
