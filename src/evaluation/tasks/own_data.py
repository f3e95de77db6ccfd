"""One function a type of task: from its checked files to the data sets that MTEB's task classes expect."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from src.evaluation.tasks.own_rows import Columns, Line, Row, read_lines

Files = Mapping[str, Path]


def _split(rows: list[Row], file: Path, least: int = 2) -> Any:
    """A `datasets.Dataset`.

    Raises:
        ValueError: fewer rows than there must be.
    """
    from datasets import Dataset

    if len(rows) < least:
        raise ValueError(f"{file} has {len(rows)} rows, and a task needs at least {least}")
    return Dataset.from_list(rows)


def _pairs(line: Line) -> Row:
    return {side: line.text(side) for side in ("sentence1", "sentence2")}


def sts(files: Files, columns: Columns) -> Any:
    """sentence1, sentence2, score (a number)."""
    from datasets import DatasetDict

    rows = [_pairs(line) | {"score": line.number("score")} for line in read_lines(files["data"], columns)]
    if len({row["score"] for row in rows}) < 2:
        raise ValueError(f"{files['data']}: all scores are equal, so nothing can go with them")
    return DatasetDict(test=_split(rows, files["data"]))


def pair_classification(files: Files, columns: Columns) -> Any:
    """sentence1, sentence2, label (1: they belong together, 0: they do not)."""
    from datasets import DatasetDict

    rows = []
    for line in read_lines(files["data"], columns):
        label = line.number("label")
        if label not in (0, 1):
            raise ValueError(f"{line.where}: label must be 0 or 1, not {line.value('label')!r}")
        rows.append(_pairs(line) | {"labels": int(label)})
    if len({row["labels"] for row in rows}) < 2:
        raise ValueError(f"{files['data']}: all labels are equal, so there is nothing to tell apart")
    return DatasetDict(test=_split(rows, files["data"]))


def _labelled(file: Path, columns: Columns) -> list[tuple[str, str]]:
    return [(line.text("text"), line.name("label")) for line in read_lines(file, columns)]


def classification(files: Files, columns: Columns) -> Any:
    """text, label (any name or number); one file to train on, one to test on."""
    from datasets import DatasetDict

    parts = {split: _labelled(files[role], columns) for split, role in (("train", "train"), ("test", "data"))}
    numbers = {label: i for i, label in enumerate(sorted({label for _, label in parts["train"]}))}
    unseen = sorted({label for _, label in parts["test"]} - set(numbers))
    if unseen:
        raise ValueError(f"{files['data']}: no text of {files['train']} has the label {unseen[0]!r}, so it cannot be learned")
    if len(numbers) < 2:
        raise ValueError(f"{files['train']}: one label alone, so there is nothing to tell apart")
    rows = {split: [{"text": text, "label": numbers[label]} for text, label in part] for split, part in parts.items()}
    return DatasetDict({split: _split(rows[split], files[role]) for split, role in (("train", "train"), ("test", "data"))})


def clustering(files: Files, columns: Columns) -> Any:
    """text, label (any name or number): texts of one label should fall together."""
    from datasets import DatasetDict

    labelled = _labelled(files["data"], columns)
    numbers = {label: i for i, label in enumerate(sorted({label for _, label in labelled}))}
    if len(numbers) < 2:
        raise ValueError(f"{files['data']}: one label alone, so there are no groups to find")
    rows = [{"sentences": text, "labels": numbers[label]} for text, label in labelled]
    return DatasetDict(test=_split(rows, files["data"]))


def retrieval(files: Files, columns: Columns) -> Any:
    """BEIR's form: corpus (id or _id, title if there is one, text), queries (id or _id, text), qrels (query-id, corpus-id, score).

    A title may stand without a text. Scores are whole numbers, for so MTEB's evaluators grade relevance.
    """
    corpus = [{"id": line.name("_id", "id")} | _document(line) for line in read_lines(files["corpus"], columns)]
    queries = [{"id": line.name("_id", "id"), "text": line.text("text")} for line in read_lines(files["queries"], columns)]
    ids = {role: _unique([row["id"] for row in rows], files[role]) for role, rows in (("corpus", corpus), ("queries", queries))}
    relevant: dict[str, dict[str, int]] = {}
    for line in read_lines(files["qrels"], columns):
        query, document = line.name("query-id"), line.name("corpus-id")
        for role, name in (("queries", query), ("corpus", document)):
            if name not in ids[role]:
                raise ValueError(f"{line.where}: {name!r} is not in {files[role]}")
        relevant.setdefault(query, {})[document] = _grade(line)
    asked = [row for row in queries if any(score > 0 for score in relevant.get(row["id"], {}).values())]
    return _searched(_split(corpus, files["corpus"]), _split(asked, files["queries"], 1), relevant, None)


def _document(line: Line) -> Row:
    title, text = line.values.get("title"), line.value("text")
    title = line.text("title") if isinstance(title, str) and title.strip() else str(title or "").strip()
    no_text = text is None or (isinstance(text, str) and not text.strip())
    return {"title": title, "text": "" if no_text and title else line.text("text")}


def _grade(line: Line) -> int:
    score = line.number("score")
    if not score.is_integer():
        raise ValueError(f"{line.where}: score must be a whole number, not {line.value('score')!r}: grade 0.5 and 1 as 1 and 2")
    return int(score)


def _unique(ids: list[str], file: Path) -> set[str]:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise ValueError(f"{file}: the id {name!r} stands there twice")
        seen.add(name)
    return seen


def reranking(files: Files, columns: Columns) -> Any:
    """query, positive and negative (lists of texts); or a row a candidate: query, document, label (1: it answers the query)."""
    candidates: dict[str, dict[str, int]] = {}
    for line in read_lines(files["data"], columns):
        own = candidates.setdefault(line.text("query"), {})
        own.update(_candidates(line))
    documents = sorted({text for own in candidates.values() for text in own})
    names = {text: hashlib.sha256(text.encode()).hexdigest()[:32] for text in documents}
    corpus = [{"id": names[text], "title": "", "text": text} for text in documents]
    answered = {query: own for query, own in candidates.items() if set(own.values()) == {0, 1}}  # others tell nothing
    queries = [{"id": f"q{i}", "text": query} for i, query in enumerate(answered)]
    relevant = {f"q{i}": {names[text]: label for text, label in own.items()} for i, own in enumerate(answered.values())}
    ranked = {query: sorted(own) for query, own in relevant.items()}  # by digest: an encoder that ties everything wins nothing
    return _searched(_split(corpus, files["data"]), _split(queries, files["data"], 1), relevant, ranked)


def _candidates(line: Line) -> Iterator[tuple[str, int]]:
    if "document" in line.values:
        label = line.number("label")
        if label not in (0, 1):
            raise ValueError(f"{line.where}: label must be 0 or 1, not {line.value('label')!r}")
        yield line.text("document"), int(label)
        return
    for field, label in (("negative", 0), ("positive", 1)):
        yield from ((text, label) for text in line.texts(field))


def _searched(corpus: Any, queries: Any, relevant: dict[str, dict[str, int]], ranked: dict[str, list[str]] | None) -> Any:
    split = {"corpus": corpus, "queries": queries, "relevant_docs": {i: relevant[i] for i in queries["id"]}, "top_ranked": ranked}
    return {"default": {"test": split}}


DATASETS: dict[str, Callable[[Files, Columns], Any]] = {
    "STS": sts,
    "PairClassification": pair_classification,
    "Retrieval": retrieval,
    "Reranking": reranking,
    "Classification": classification,
    "Clustering": clustering,
}
"""By type of task."""
