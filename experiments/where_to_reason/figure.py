"""Summarises results.md over its models of one kind (GRACE, distilled): a table of means, and where_to_reason.png beside it.

python -m experiments.where_to_reason.figure
"""

from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt

from experiments.smollm2_learning.report import markdown

HERE = Path(__file__).parent
KINDS = {"protected": "GRACE", "distill": "GRACE and distilled"}
"""Part of a model's path -> title."""
Rows = dict[str, list[list[float]]]
"""Value of `rationale` -> the numbers of its row, a model each."""


def read(text: str) -> dict[str, Rows]:
    """Reads the sections of results.md by kind."""
    found: dict[str, Rows] = {title: {} for title in KINDS.values()}
    for section in text.split("\n## ")[1:]:
        title = next(title for part, title in KINDS.items() if part in section.splitlines()[0])
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] in ("both", "query", "document", "none"):
                found[title].setdefault(cells[0], []).append([float(cell) for cell in cells[1:]])
    return found


def main() -> None:
    found = read((HERE / "results.md").read_text(encoding="utf-8"))
    lines = [["", "rationales of", "DocstringRetrieval", "DocstringReranking", "average of 5"]]
    for title, rows in found.items():
        for value, models in rows.items():
            columns = list(zip(*models, strict=True))[:3]
            lines.append([title, value, *(f"{fmean(column):.1f} ± {stdev(column):.1f}" for column in columns)])
    print(markdown(lines))
    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(6.0, 3.4), dpi=120, layout="constrained")
    for offset, (title, rows) in enumerate(found.items()):
        for place, models in enumerate(rows.values()):
            scores, x = [model[0] for model in models], place + 0.4 * offset - 0.2
            label = title if place == 0 else None
            axis.bar(x, fmean(scores), width=0.38, color=("tab:blue", "tab:orange")[offset], alpha=0.5, label=label)
            axis.plot([x] * len(scores), scores, ".", color="black", markersize=4)
            axis.set_xticks(range(len(rows)), [f"rationales of\n{name}" for name in rows])
    axis.set_ylabel("DocstringRetrieval, nDCG@10 in %")
    axis.legend(frameon=False, loc="lower left")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(HERE / "where_to_reason.png")


if __name__ == "__main__":
    main()
