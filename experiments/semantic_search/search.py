"""Searches the docstrings of installed packages, and shows why a hit was one: `python -m experiments.semantic_search.search`."""

import argparse
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.datamodules.docstrings import Docstring, collect, cut_between_words
from src.modules.encoder.encoder import RationaleEncoder

ROOT = Path(__file__).resolve().parents[2]
QUERIES = (
    "find the shortest path between two nodes of a graph",
    "fill in missing values of a table",
    "turn strings into dates",
)


@dataclass(frozen=True)
class Index:
    """Documents with their unit vectors, [N, D] float32, and the rationales behind these."""

    documents: Sequence[Docstring]
    vectors: np.ndarray
    rationales: Sequence[str]


@dataclass(frozen=True)
class Hit:
    """A document found, why, and its cosine to the query."""

    document: Docstring
    rationale: str
    cosine: float


def units(vectors: np.ndarray) -> np.ndarray:
    """[N, D] of length one."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(encoder: RationaleEncoder, documents: Sequence[Docstring], show_progress: bool = False) -> Index:
    """Reads every document once; a text is the summary line and what follows it."""
    texts = [f"{doc.summary} {cut_between_words(doc.body, 320)}" for doc in documents]
    vectors, rationales = encoder.explain(texts, prompt_type="document", show_progress=show_progress)
    return Index(documents, units(vectors), rationales)


def search(encoder: RationaleEncoder, index: Index, queries: Sequence[str], hits: int) -> list[tuple[str, list[Hit]]]:
    """For each query its own rationale and the nearest documents, best first."""
    vectors, rationales = encoder.explain(queries, prompt_type="query")
    found = []
    for cosines, rationale in zip(units(vectors) @ index.vectors.T, rationales, strict=True):
        best = np.argsort(-cosines, kind="stable")[:hits]
        found.append((rationale, [Hit(index.documents[i], index.rationales[i], float(cosines[i])) for i in best]))
    return found


def show(query: str, rationale: str, hits: Sequence[Hit]) -> str:
    """A query and its hits as lines of text."""

    def line(label: str, text: str) -> str:
        return textwrap.fill(text, width=110, initial_indent=f"   {label:9s} ", subsequent_indent=" " * 13)

    lines = [f"\n{query}", line("rationale", rationale)]
    for hit in hits:
        lines += [f" {hit.cosine:.3f}  {hit.document.id}", line("text", hit.document.summary), line("rationale", hit.rationale)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("queries", nargs="*", default=QUERIES, help="what to look for")
    parser.add_argument("--model", default=ROOT / "experiments" / "tiny_policy" / "weights", help="folder, checkpoint or hub name")
    parser.add_argument("--packages", nargs="+", default=["pandas", "networkx"], help="whose docstrings")
    parser.add_argument("--cache", default=ROOT / "data" / "cache", help="where docstrings are kept once read")
    parser.add_argument("--hits", type=int, default=3, help="how many to show")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    encoder = RationaleEncoder.from_pretrained(options.model)
    index = build(encoder, collect(options.packages, options.cache), show_progress=True)
    print(f"{len(index.documents):,} docstrings of {', '.join(options.packages)} read in {time.perf_counter() - began:.0f} seconds")
    for query, (rationale, hits) in zip(options.queries, search(encoder, index, options.queries, options.hits), strict=True):
        print(show(query, rationale, hits))


if __name__ == "__main__":
    main()
