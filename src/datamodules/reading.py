"""Makes checked triplets of the rows of files."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

from src.datamodules.columns import Given, Roles, given_columns, in_words, roles_of
from src.datamodules.files import DataFile
from src.datamodules.rows import BadRecord, Chunk, checked_text, json_value, kind_of, parsed, records, text_lines
from src.records import Triplet

_PEEKED = 1000  # rows in which names of columns are looked for
_TABLES = ("parquet", "csv", "tsv")
_JSON_LINES = ("jsonl", "ndjson", "json")
_BEGINS_AS_OBJECT = re.compile(r'(\[\s*)?\{\s*"')  # or as an array of objects

Tally = Counter[str]
"""How many texts were left out of records, by the name that preparation.Report has for the count."""


class Reader(Protocol):
    """Makes triplets of a file's content. A dataclass: its `repr` is part of the name of a prepared folder."""

    def read(self, chunk: Chunk, tally: Tally | None = None) -> Iterator[Triplet | BadRecord]:
        """Yields the records of a chunk, malformed ones as BadRecord; adds to `tally` what it leaves out of good ones."""

    def describe(self, file: DataFile) -> str:
        """Returns on one line how a file is read."""


@dataclass(frozen=True)
class TripletReader:
    """Reads parquet, CSV, TSV or JSON lines with a query, a positive, negatives and optionally a source.

    Texts stand in columns that `columns` names or `columns.RECOGNISED` knows. A negative may be a list, and in several columns; of a list
    of positives the first is used. A record without a source gets the stem of its file. Blank lines are skipped.

    Attributes:
        negatives: M, the number of a record's negatives that are used, the first ones; 0 makes them optional.
        columns: names by role, see `given_columns`.

    Raises:
        ValueError: a number below 0, or an unknown role.
    """

    negatives: int = 1
    columns: Mapping[str, Any] | Given = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise ValueError(f"datamodule.reader.negatives={self.negatives}: it must be at least 0")
        object.__setattr__(self, "columns", given_columns(dict(self.columns), (*self.needed, "negative", "source")))

    @property
    def needed(self) -> tuple[str, ...]:
        """Roles that every record must have."""
        return ("query", "positive", "negative") if self.negatives else ("query", "positive")

    def read(self, chunk: Chunk, tally: Tally | None = None) -> Iterator[Triplet | BadRecord]:
        make = partial(self._triplet, chunk.file, Tally() if tally is None else tally)
        return (record for _, record in parsed(records(chunk, self._select), make))

    def describe(self, file: DataFile) -> str:
        return in_words(self._roles(first_names(file)))

    def _roles(self, names: Sequence[str]) -> Roles:
        return roles_of(tuple(names), self.columns, (*self.needed, "source"))

    def _missing(self, names: Sequence[str], roles: Roles) -> str:
        given, missing = dict(self.columns), [role for role in self.needed if role not in roles]
        missing += [role for role in given if role not in (*roles, *missing, "negative")]
        return ", ".join(f"{role} ({'; '.join(given[role])})" if role in given else role for role in missing)

    def _select(self, file: str, names: Sequence[str]) -> Sequence[str]:
        roles = self._roles(names)
        if missing := self._missing(names, roles):
            advice = f"name it by datamodule.columns.{missing.split()[0].rstrip(',')}=<name>"
            if missing == "negative":
                advice += ", or set datamodule.reader.negatives=0 for pairs without negatives"
            raise ValueError(f"{file} has no column {missing}; it has {', '.join(names)}: {advice}")
        return [name for columns in roles.values() for name in columns]

    def _triplet(self, file: DataFile, tally: Tally, where: str, values: Any) -> Triplet:
        if not isinstance(values, dict):
            raise ValueError(f"a record is a JSON object with {', '.join(self.needed)}, not {kind_of(values)}")
        roles = self._roles(tuple(values))
        if missing := self._missing(tuple(values), roles):
            named = f"; it has {', '.join(values)} (datamodule.columns)" if values else ""
            raise ValueError(f"no field {missing}{named}")
        query, positive = (_first(name, values[name]) for name in (roles["query"][0], roles["positive"][0]))
        negatives = self._negatives([(name, values[name]) for name in roles.get("negative", ())], {query.strip(), positive.strip()}, tally)
        source = values[roles["source"][0]] if "source" in roles else None
        return Triplet(where, query, positive, negatives, file.stem if source in (None, "", b"") else checked_text("source", source))

    def _negatives(self, columns: list[tuple[str, Any]], own: set[str], tally: Tally) -> tuple[str, ...]:
        """Returns the first M that differ from the own texts, query and positive; adds those that were passed over to `tally`."""
        values = [(name, text) for name, value in columns for text in (value if isinstance(value, list) else [value])]
        if len(values) < self.negatives:
            names = ", ".join(name for name, _ in columns)
            raise ValueError(f"{names} has {len(values)} texts, datamodule.reader.negatives={self.negatives} asks for more")
        texts = (checked_text(name, text) for name, text in values)
        kept: list[str] = []
        passed = 0
        while len(kept) < self.negatives:
            text = next(texts, None)
            if text is None:
                raise ValueError("a negative equals the query or the positive, and would cancel what they teach")
            if text.strip() in own:
                passed += 1
            else:
                kept.append(text)
        tally["equal_negatives"] += passed
        return tuple(kept)


@dataclass(frozen=True)
class SentenceReader:
    """Reads one text a line, which is its own query and positive (unsupervised). Blank lines are skipped.

    A line that is a JSON object, and a row of parquet, CSV or TSV, gives the text of a column: the one that `columns` names, `text` or
    `sentence`, or the only one of a table. A line of .jsonl, .ndjson or .json is such an object or a JSON string, which is the text. A line
    of text that is a JSON array, or begins as an object does and is none, is malformed.

    Attributes:
        columns: the name of `text`, see `given_columns`.
    """

    columns: Mapping[str, Any] | Given = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", given_columns(dict(self.columns), ("text",)))

    def read(self, chunk: Chunk, tally: Tally | None = None) -> Iterator[Triplet | BadRecord]:
        is_text = chunk.file.format not in (*_TABLES, *_JSON_LINES)
        rows = parsed(text_lines(chunk), _text_or_object) if is_text else records(chunk, self._select)
        return (record for _, record in parsed(rows, partial(self._triplet, chunk.file)))

    def describe(self, file: DataFile) -> str:
        if file.format not in _TABLES:
            return "a text a line"
        names = first_names(file)
        return f"text={self._column(names, table=True)}" if names else ""

    def _column(self, names: Sequence[str], table: bool) -> str:
        roles = roles_of(tuple(names), self.columns, ("text",))
        if not roles and not self.columns and table and len(names) == 1:
            return names[0]
        if not roles:
            wanted = dict(self.columns).get("text", ("text",))[0]
            what = "no column" if table else "a JSON object without the field"
            triplets = len(roles_of(tuple(names), (), ("query", "positive"))) == 2
            advice = "datamodule.columns.text=<name>" + (", or datamodule=triplets" if triplets else "")
            raise ValueError(f"{what} {wanted!r}; it has {', '.join(names)}: {advice}")
        return roles["text"][0]

    def _select(self, file: str, names: Sequence[str]) -> Sequence[str]:
        try:
            return [self._column(names, table=True)]
        except ValueError as error:
            raise ValueError(f"{file} has {error}") from error

    def _triplet(self, file: DataFile, where: str, row: Any) -> Triplet:
        if not isinstance(row, dict | str):
            raise ValueError(f"a line is a JSON object or a JSON string, not {kind_of(row)}")
        name = self._column(tuple(row), file.format in _TABLES) if isinstance(row, dict) else "text"
        text = checked_text(name, row[name] if isinstance(row, dict) else row).strip()
        return Triplet(where, text, text, (), file.stem)


def first_names(file: DataFile) -> tuple[str, ...]:
    """Returns the names of a file's columns, by its first row that has some; none without such a row."""
    rows = records(Chunk(file), lambda _, names: names)
    return next((tuple(row) for _, row in islice(rows, _PEEKED) if isinstance(row, dict)), ())


def _first(name: str, value: Any) -> str:
    """Returns a text, of a list the first."""
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name} has 0 texts")
        value = value[0]
    return checked_text(name, value)


def _text_or_object(where: str, line: str) -> Any:
    """Returns the JSON object that a line of text is, else the line, such as a sentence in braces.

    Raises:
        ValueError: the line is a JSON array (but for numbers alone, such as [1]), or begins as a JSON object and is none.
    """
    text = line.strip()
    try:
        value = json_value(where, text) if text.startswith(("{", "[")) else text
    except ValueError:
        if _BEGINS_AS_OBJECT.match(text):
            raise
        return text
    if not isinstance(value, list):
        return value
    if all(isinstance(item, int | float) for item in value):
        return text
    raise ValueError("a line is text or a JSON object, not a list")
