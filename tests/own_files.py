"""A folder with a small own task of every type, as a user would write them."""

from pathlib import Path
from typing import Any

from tests.datamodules.builders import write

TOPICS = {
    "graphs": ["the shortest path between two nodes", "edges of a directed graph", "colour the nodes of a graph", "a tree has no cycles"],
    "files": ["open a file and read its lines", "write a table to disk", "the path of a folder", "delete what is on disk"],
    "numbers": ["solve a linear system", "eigenvalues of a matrix", "draw from a normal distribution", "the mean of a sample"],
}
TEXTS = [text for texts in TOPICS.values() for text in texts]
LABELS = [topic for topic, texts in TOPICS.items() for _ in texts]
SCORED = [(4.8, 0, 1), (1.0, 0, 4), (0.2, 1, 8), (3.9, 4, 5), (2.5, 5, 10), (4.1, 8, 9), (0.0, 2, 11), (3.0, 10, 11), (1.7, 3, 6)]
"""A score and two indices into TEXTS."""


def tsv(file: Path, rows: list[tuple[Any, ...]]) -> None:
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def describe(folder: Path, name: str, kind: str, rest: str) -> Path:
    """Writes the YAML file of a task."""
    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\ntype: {kind}\n{rest}\n", encoding="utf-8")
    return file


def write_own_tasks(folder: Path) -> Path:
    """Writes a task of each type on a dozen texts; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tsv(folder / "sts.tsv", [(score, TEXTS[a], TEXTS[b]) for score, a, b in SCORED])
    describe(folder, "MySTS", "STS", "data: sts.tsv\ncolumns: [score, sentence1, sentence2]")
    pairs = [(TEXTS[a], TEXTS[b], int(LABELS[a] == LABELS[b])) for _, a, b in SCORED]
    tsv(folder / "pairs.tsv", [("first", "second", "same"), *pairs])
    describe(folder, "MyPairs", "PairClassification", "data: pairs.tsv\ncolumns: {sentence1: first, sentence2: second, label: same}")
    write(folder / "corpus.jsonl", *[{"_id": i, "title": LABELS[i], "text": text} for i, text in enumerate(TEXTS)])
    write(folder / "queries.jsonl", *[{"_id": f"q{i}", "text": topic} for i, topic in enumerate(TOPICS)])
    relevant = [(f"q{list(TOPICS).index(label)}", i, 1) for i, label in enumerate(LABELS)]
    tsv(folder / "qrels.tsv", [("query-id", "corpus-id", "score"), *relevant])
    describe(folder, "MyRetrieval", "Retrieval", "corpus: corpus.jsonl\nqueries: queries.jsonl\nqrels: qrels.tsv")
    others = {topic: [text for text, label in zip(TEXTS, LABELS, strict=True) if label != topic] for topic in TOPICS}
    write(folder / "rerank.jsonl", *[{"query": t, "positive": TOPICS[t][:2], "negative": others[t][:3]} for t in TOPICS])
    describe(folder, "MyReranking", "Reranking", "data: rerank.jsonl")
    labelled = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    for name, rows in (("train", labelled[::2]), ("test", labelled[1::2]), ("all", labelled)):
        write(folder / f"{name}.jsonl", *rows)
    describe(folder, "MyClassification", "Classification", "train: train.jsonl\ndata: test.jsonl")
    describe(folder, "MyClustering", "Clustering", "data: all.jsonl")
    return folder
