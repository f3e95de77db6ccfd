"""The paper's two tables as rows of numbers, and what is made of them: Markdown, CSV, a figure. Pure functions."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

CATEGORIES = {
    "Retrieval": "Retr.",
    "Reranking": "Rerank.",
    "Clustering": "Clust.",
    "PairClassification": "PairCls.",
    "Classification": "Class.",
    "STS": "STS",
    "Summarization": "Summ.",
}
"""Main score of each of MTEB's categories, in the paper's order, under the paper's heads."""

AVERAGE = "average"
NOT_MEASURED = "n/m"

Scores = Mapping[str, float]
"""Category or `average` -> per cent."""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        table: `supervised` or `unsupervised`.
        backbone, name: e.g. `Qwen2.5-1.5B-Instruct`, `GRACE`.
        ours: what was measured here; None where nothing was.
        published: the paper's numbers, as far as they are known.
        note: what is to be said of `ours`: tasks without a score, the run it comes from.
    """

    table: str
    backbone: str
    name: str
    ours: Scores | None
    published: Scores
    note: str = ""


def cell(row: Row, column: str) -> str:
    """`ours (the paper's)`, either of them alone, or the mark of what nobody measured."""
    ours = None if row.ours is None else row.ours.get(column)
    left = NOT_MEASURED if ours is None else f"{ours:.2f}"
    return f"{left} ({row.published[column]:.2f})" if column in row.published else left


def markdown(rows: Sequence[Row]) -> str:
    """A section a table, a line a row; notes below, numbered."""
    lines, notes = [], list(dict.fromkeys(row.note for row in rows if row.note))
    for table in dict.fromkeys(row.table for row in rows):
        lines += [f"## {table.capitalize()}", ""]
        lines.append("| backbone | | " + " | ".join([*CATEGORIES.values(), AVERAGE]) + " |")
        lines.append("| --- | --- |" + " ---: |" * (len(CATEGORIES) + 1))
        for row in (row for row in rows if row.table == table):
            mark = f" [{notes.index(row.note) + 1}]" if row.note else ""
            cells = [cell(row, column) for column in (*CATEGORIES, AVERAGE)]
            lines.append("| " + " | ".join([row.backbone, row.name + mark, *cells]) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip() + "\n"


def as_csv(rows: Iterable[Row]) -> str:
    """One line a number, for other programs: an empty field is a number that nobody has."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "backbone", "row", "column", "ours", "published"])
    for row in rows:
        for column in (*CATEGORIES, AVERAGE):
            numbers = [None if row.ours is None else row.ours.get(column), row.published.get(column)]
            writer.writerow([row.table, row.backbone, row.name, column, *("" if n is None else f"{n:.2f}" for n in numbers)])
    return text.getvalue()


def figure(rows: Sequence[Row]) -> Figure:
    """Averages: a panel a table, a group of bars a backbone; filled what was measured here, outlined what the paper says."""
    tables = list(dict.fromkeys(row.table for row in rows))
    drawn = Figure(figsize=(9.0, 3.4 * len(tables)), dpi=120, layout="constrained")
    for axis, table in zip(drawn.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        own = [row for row in rows if row.table == table]
        names, backbones = (list(dict.fromkeys(getattr(row, key) for row in own)) for key in ("name", "backbone"))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            for row in (row for row in own if row.name == name):
                place = backbones.index(row.backbone) + (number - (len(names) - 1) / 2) * width
                if row.ours is not None and AVERAGE in row.ours:
                    axis.bar(place, row.ours[AVERAGE], width, color=f"C{number}")
                if AVERAGE in row.published:
                    axis.bar(place, row.published[AVERAGE], width, fill=False, edgecolor=f"C{number}", linestyle="--")
            axis.bar(0, 0, color=f"C{number}", label=name)
        axis.set_xticks(range(len(backbones)), backbones)
        axis.set_title(f"{table}: filled here, dashed the paper's", fontsize=10)
        axis.set_ylabel("average, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawn
