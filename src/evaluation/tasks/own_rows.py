"""Rows of the files behind one's own tasks: jsonl or tsv in, checked columns out, errors by file and line."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.datamodules.files import DataFile
from src.datamodules.reading import BadRecord, Chunk, checked_text, json_rows, text_lines

Row = dict[str, Any]
Columns = Sequence[str] | Mapping[str, str] | None
"""A list: names of the columns of tsv files that have no line of names. A mapping: our field -> the file's own name of it."""


class Line:
    """One row of a file, and where it stands, for errors.

    Attributes:
        where: file:line.
        values: by field.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def value(self, *fields: str) -> Any:
        """The value of the first of these fields that the row has.

        Raises:
            ValueError: it has none of them.
        """
        for field in fields:
            if field in self.values:
                return self.values[field]
        raise ValueError(f"{self.where}: no field {' or '.join(fields)}; there are {', '.join(map(str, self.values))}")

    def text(self, *fields: str) -> str:
        """The same as text with something in it."""
        return self._checked(fields[0], self.value(*fields))

    def texts(self, field: str) -> list[str]:
        """A list of texts."""
        values = self.value(field)
        if not isinstance(values, list):
            raise ValueError(f"{self.where}: {field} must be a list of texts")
        return [self._checked(field, value) for value in values]

    def name(self, *fields: str) -> str:
        """An id or a label, given as text or as a number."""
        value = self.value(*fields)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(*fields)

    def number(self, field: str) -> float:
        """A finite number."""
        value = self.value(field)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not abs(number) < float("inf"):
            raise ValueError(f"{self.where}: {field} must be a number, not {value!r}")
        return number

    def _checked(self, field: str, value: Any) -> str:
        try:
            return checked_text(field, value)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


def read_lines(file: Path, columns: Columns) -> Iterator[Line]:
    """The rows of a .jsonl file (an object a line) or of a .tsv file (tabs between fields, nothing quoted).

    The first line of a tsv file names its columns, unless `columns` is a list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a malformed line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    if file.suffix not in (".jsonl", ".tsv"):
        raise ValueError(f"{file}: the files of a task of your own are .jsonl or .tsv")
    chunk = Chunk(DataFile(file, str(file)), 0, file.stat().st_size, 1, 0)
    renamed = {theirs: ours for ours, theirs in columns.items()} if isinstance(columns, Mapping) else {}
    named = None if columns is None or isinstance(columns, Mapping) else list(columns)
    for where, values in json_rows(chunk) if file.suffix == ".jsonl" else _tsv_rows(chunk, named):
        if isinstance(values, BadRecord):
            raise ValueError(str(values))
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a row is a JSON object")
        # a column of the file's own that has the name which another is given is not that one
        kept = {name: value for name, value in values.items() if name in renamed or name not in renamed.values()}
        yield Line(where, {renamed.get(str(name), str(name)): value for name, value in kept.items()})


def _tsv_rows(chunk: Chunk, names: list[str] | None) -> Iterator[tuple[str, Any]]:
    for where, line in text_lines(chunk):
        if isinstance(line, BadRecord):
            yield where, line
            continue
        fields = line.rstrip("\r\n").split("\t")
        if names is None:
            names = fields
        elif len(fields) != len(names):
            raise ValueError(f"{where}: {len(fields)} fields between tabs, and the columns are {', '.join(names)}")
        else:
            yield where, dict(zip(names, fields, strict=True))


def content_digest(files: Sequence[Path], settings: str) -> str:
    """16 hexadecimal characters that change with the files' content and with the settings.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256(settings.encode())
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
