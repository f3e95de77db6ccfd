"""Data of a user's own tasks: files of JSON lines or tab-separated values, checked row by row, as MTEB's task classes expect it.

There is one function a task type. Each takes `columns` (see `read_rows`) and the task's files, returns a `Set`, and raises ValueError
with file and line if a row is malformed.
"""

import hashlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, FiniteFloat, ValidationError, ValidationInfo, create_model

from src.datamodules.files import DataFile
from src.datamodules.rows import BadRecord, Chunk, checked_text, json_rows, tsv_rows
from src.evaluation.tasks.made_tasks import Row, Set, search_set

Columns = Sequence[str] | Mapping[str, str] | None


def _text(value: Any, info: ValidationInfo) -> str:
    return checked_text(str(info.field_name), value)


def _text_or_blank(value: Any, info: ValidationInfo) -> str:
    return "" if value is None or (isinstance(value, str) and not value.strip()) else _text(value, info)


def _name(value: Any, info: ValidationInfo) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, info)


Text = Annotated[str, BeforeValidator(_text)]
TextOrBlank = Annotated[str, BeforeValidator(_text_or_blank)]
Name = Annotated[str, BeforeValidator(_name)]  # an id or a label, given as text or as a whole number
Id = Annotated[Name, Field(validation_alias=AliasChoices("_id", "id"))]
Binary = Annotated[int, Field(ge=0, le=1)]  # 1: the texts belong together, or the document answers the query


def read_rows(file: Path, columns: Columns, **fields: Any) -> Iterator[tuple[str, Row]]:
    """Yields file:line and the fields of each line of a .jsonl file (an object a line) or a .tsv file (nothing is quoted).

    Args:
        columns: a list names the columns of a tsv file without a header; a mapping gives the file's name of some fields.
        fields: the types of the fields, as pydantic's `create_model` takes them. Others are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or a line is malformed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    if file.suffix not in (".jsonl", ".tsv"):
        raise ValueError(f"{file}: data of your own tasks is read from .jsonl and .tsv files")
    model: Any = create_model("Row", **fields)
    renamed = {theirs: ours for ours, theirs in columns.items()} if isinstance(columns, Mapping) else {}
    chunk, names = Chunk(DataFile(file, str(file))), None if isinstance(columns, Mapping) else columns
    for where, values in json_rows(chunk) if file.suffix == ".jsonl" else tsv_rows(chunk, names):
        if isinstance(values, BadRecord):
            raise ValueError(str(values))
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a row is a JSON object")
        # a column whose name another one is given is left out
        found = {str(renamed.get(name, name)): value for name, value in values.items() if name in renamed or name not in renamed.values()}
        try:
            row: Row = model.model_validate(found).model_dump()
        except ValidationError as error:
            raise ValueError(f"{where}: {problems(error)}; the fields are {', '.join(found)}") from error
        yield where, row


def problems(error: ValidationError) -> str:
    """Returns on one line what pydantic found."""

    def line(problem: Any) -> str:
        if problem["type"] == "value_error":
            return str(problem["ctx"]["error"])
        given = "" if problem["type"] in ("missing", "extra_forbidden") else f", not {reprlib.repr(problem['input'])}"
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}{given}"

    return "; ".join(map(line, error.errors(include_url=False)))


def sts(columns: Columns, data: Path) -> Set:
    """sentence1, sentence2, score."""
    rows = [row for _, row in read_rows(data, columns, sentence1=Text, sentence2=Text, score=FiniteFloat)]
    if len({row["score"] for row in rows}) < 2:
        raise ValueError(f"{data}: all scores are equal, so nothing can correlate with them")
    return {"test": _enough(rows, data)}


def pair_classification(columns: Columns, data: Path) -> Set:
    """sentence1, sentence2, label (0 or 1)."""
    rows = [row for _, row in read_rows(data, columns, sentence1=Text, sentence2=Text, label=Binary)]
    if len({row["label"] for row in rows}) < 2:
        raise ValueError(f"{data}: all labels are equal, so there is nothing to tell apart")
    pairs = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"], "labels": row["label"]} for row in rows]
    return {"test": _enough(pairs, data)}


def classification(columns: Columns, train: Path, data: Path) -> Set:
    """text, label; a file to train on, and one to test on."""
    labelled = {file: _labelled(file, columns) for file in (train, data)}
    numbers = _numbered(labelled[train], train)
    unseen = sorted({row["label"] for row in labelled[data]} - set(numbers))
    if unseen:
        raise ValueError(f"{data}: no text of {train} has the label {unseen[0]!r}, so it cannot be learned")
    numbered = {file: _enough([row | {"label": numbers[row["label"]]} for row in rows], file) for file, rows in labelled.items()}
    return {"train": numbered[train], "test": numbered[data]}


def clustering(columns: Columns, data: Path) -> Set:
    """text, label."""
    rows = _labelled(data, columns)
    numbers = _numbered(rows, data)
    return {"test": _enough([{"sentences": row["text"], "labels": numbers[row["label"]]} for row in rows], data)}


def retrieval(columns: Columns, corpus: Path, queries: Path, qrels: Path) -> Set:
    """BEIR's form: corpus (_id or id, text, title unless there is none), queries (_id or id, text), qrels (query-id, corpus-id, score).

    A document may have a title alone. Scores are whole numbers, for MTEB's evaluators need grades.
    """
    documents = []
    for where, row in read_rows(corpus, columns, id=Id, title=(TextOrBlank, ""), text=TextOrBlank):
        if not row["title"] and not row["text"]:
            raise ValueError(f"{where}: text is empty, and there is no title")
        documents.append(row)
    asked = [row for _, row in read_rows(queries, columns, id=Id, text=Text)]
    ids = {file: _unique([row["id"] for row in rows], file) for file, rows in ((corpus, documents), (queries, asked))}
    relevant: dict[str, dict[str, int]] = {}
    query_id, corpus_id = (Annotated[Name, Field(validation_alias=name)] for name in ("query-id", "corpus-id"))
    for where, row in read_rows(qrels, columns, query=query_id, document=corpus_id, score=int):
        for file, name in ((queries, row["query"]), (corpus, row["document"])):
            if name not in ids[file]:
                raise ValueError(f"{where}: {name!r} is not in {file}")
        relevant.setdefault(row["query"], {})[row["document"]] = row["score"]
    answered = [row for row in asked if any(score > 0 for score in relevant.get(row["id"], {}).values())]
    return search_set(_enough(documents, corpus), _enough(answered, queries, 1), relevant)


def reranking(columns: Columns, data: Path) -> Set:
    """query, positive and negative (lists of texts); or a row a candidate: query, document, label (0 or 1)."""
    candidates: dict[str, dict[str, int]] = {}  # label of each document, by query
    texts, optional = (list[Text] | None, None), {"document": (Text | None, None), "label": (Binary | None, None)}
    for where, row in read_rows(data, columns, query=Text, positive=texts, negative=texts, **optional):
        labels = candidates.setdefault(row["query"], {})
        if None not in (row["document"], row["label"]):
            labels[row["document"]] = row["label"]
        elif None not in (row["positive"], row["negative"]):
            labels |= dict.fromkeys(row["negative"], 0) | dict.fromkeys(row["positive"], 1)
        else:
            raise ValueError(f"{where}: a row has a query, and either positive and negative or document and label")
    documents = sorted({text for labels in candidates.values() for text in labels})
    names = {text: hashlib.sha256(text.encode()).hexdigest()[:32] for text in documents}
    corpus = [{"id": name, "title": "", "text": text} for text, name in names.items()]
    ranked = {query: labels for query, labels in candidates.items() if set(labels.values()) == {0, 1}}  # others have nothing to rank
    queries = [{"id": f"q{i}", "text": query} for i, query in enumerate(ranked)]
    relevant = {f"q{i}": {names[text]: label for text, label in labels.items()} for i, labels in enumerate(ranked.values())}
    order = {query: sorted(labels) for query, labels in relevant.items()}  # by digest, so that equal scores do not win by the order
    return search_set(_enough(corpus, data), _enough(queries, data, 1), relevant, order)


def _labelled(file: Path, columns: Columns) -> list[Row]:
    return [row for _, row in read_rows(file, columns, text=Text, label=Name)]


def _numbered(rows: Sequence[Row], file: Path) -> dict[str, int]:
    numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in rows}))}
    if len(numbers) < 2:
        raise ValueError(f"{file}: one label alone, so there is nothing to tell apart")
    return numbers


def _unique(ids: list[str], file: Path) -> set[str]:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise ValueError(f"{file}: the id {name!r} is there twice")
        seen.add(name)
    return seen


def _enough(rows: list[Row], file: Path, least: int = 2) -> list[Row]:
    if len(rows) < least:
        raise ValueError(f"{file} has {len(rows)} rows, and a task needs at least {least}")
    return rows
