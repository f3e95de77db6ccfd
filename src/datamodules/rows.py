"""Reads the rows of files: lines of text, JSON lines, CSV, TSV, parquet.

A malformed row is yielded as a BadRecord with file and line, and reading goes on.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from src.datamodules.files import DataFile

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is malformed; it is skipped without being held in memory."""


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read at once; by default all of it.

    Attributes:
        file: the file.
        start, end: offsets in bytes, of a .gz those of the decompressed text; in a parquet file, numbers of row groups.
        first: number of its first line or row in the file, from 1.
        size: bytes, for progress.
    """

    file: DataFile
    start: int = 0
    end: int = sys.maxsize
    first: int = 1
    size: int = 0


@dataclass(frozen=True)
class BadRecord:
    """A malformed line or row: where it is (file:line, counted from 1), and why it cannot be used."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Rows = Iterator[tuple[str, Any]]
"""file:line of each line or row, and its value or a BadRecord."""

Select = Callable[[str, Sequence[str]], Sequence[str]]
"""(file, its columns) -> those to read; raises ValueError if one that is needed is not there."""


def records(chunk: Chunk, select: Select) -> Rows:
    """Yields a dict of each row of a file of records, by the file's format: parquet, CSV, TSV, else JSON lines (any JSON value).

    Args:
        select: called with the header of a parquet, CSV or TSV file.

    Raises:
        ValueError: a file is damaged, or `select` refuses its columns.
    """
    if chunk.file.format == "parquet":
        return parquet_rows(chunk, select)
    if chunk.file.format == "csv":
        return csv_rows(chunk, select)
    return tsv_rows(chunk, select=select) if chunk.file.format == "tsv" else json_rows(chunk)


def parsed(rows: Rows, parse: Callable[[str, Any], Any]) -> Rows:
    """Applies `parse(where, value)` to each row; a ValueError makes the row a BadRecord."""
    for where, value in rows:
        if not isinstance(value, BadRecord):
            try:
                value = parse(where, value)
            except ValueError as error:
                value = BadRecord(where, str(error))
        yield where, value


def checked_text(field: str, value: Any) -> str:
    """Returns a value that is a non-empty text, without byte order marks; bytes, which parquet gives, are decoded.

    Raises:
        ValueError: it is no text, is blank, or holds a NUL, invalid UTF-8 or half of a surrogate pair.
    """
    if isinstance(value, bytes):
        value = _decoded(value, f"{field} is ")
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, not {kind_of(value)}")
    value = value.replace("\ufeff", "")  # JSON can escape it; `_checked_line` removes literal ones
    if not value.strip():
        raise ValueError(f"{field} is empty")
    if "\0" in value:
        raise ValueError(f"{field} has a NUL character")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{field} has half of a surrogate pair, which is no character")
    return value


def kind_of(value: Any) -> str:
    """Returns what JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _decoded(raw: bytes, what: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x})") from error


# ---- lines


class _Lines:
    """The lines of a chunk, as an iterator that goes on after a ValueError about one; `number` is that of the last line, from 1."""

    def __init__(self, chunk: Chunk, file: BinaryIO) -> None:
        self._file, self._end, self.number = file, chunk.end, chunk.first - 1
        file.seek(chunk.start)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_LINE_BYTES + 1) if self._file.tell() < self._end else b""
        if not raw:
            raise StopIteration
        self.number += 1
        return _checked_line(raw, self._file)


def text_lines(chunk: Chunk) -> Rows:
    """Yields the text of each line that is not blank."""
    with _opened(chunk.file) as file:
        lines = _Lines(chunk, file)
        while True:
            try:
                line: str | BadRecord = next(lines)
            except StopIteration:
                return
            except ValueError as error:
                line = BadRecord(f"{chunk.file.name}:{lines.number}", str(error))
            if isinstance(line, BadRecord) or line.strip():
                yield f"{chunk.file.name}:{lines.number}", line


def json_rows(chunk: Chunk) -> Rows:
    """Yields the JSON value of each line. Raises ValueError for a .json file that is one array."""
    if chunk.file.format == "json":
        with _opened(chunk.file) as content:
            if content.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise ValueError(f"{chunk.file.name} is one JSON array: write JSON lines, one record a line")
    return parsed(text_lines(chunk), json_value)


def json_value(where: str, line: str) -> Any:
    """Returns the JSON value of a line; raises ValueError if it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise ValueError(f"not JSON that can be read ({error})") from error


def tsv_rows(chunk: Chunk, names: Sequence[str] | None = None, select: Select | None = None) -> Rows:
    """Yields the fields of each line, a dict of text by column. Fields stand between tabs, and quotes have no meaning.

    Args:
        names: of the columns; if None, the first line names them.
        select: see `records`.
    """
    for where, line in text_lines(chunk):
        fields = [] if isinstance(line, BadRecord) else line.rstrip("\r\n").split("\t")
        if isinstance(line, BadRecord):
            yield where, line
        elif names is None:
            names = _header(chunk, fields, select)
        elif len(fields) != len(names):
            yield where, BadRecord(where, f"{len(fields)} fields between tabs, and the columns are {', '.join(names)}")
        else:
            yield where, dict(zip(names, fields, strict=True))


def csv_rows(chunk: Chunk, select: Select | None = None) -> Rows:
    """Yields the fields of each row, a dict of text by column, which the first row names.

    Commas stand between fields; quoted fields may hold commas, line ends and doubled quotes (RFC 4180). A row is named by its first line.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with _opened(chunk.file) as file:
        lines = _Lines(chunk, file)
        rows, names = csv.reader(lines, strict=True), None
        while True:
            where = f"{chunk.file.name}:{lines.number + 1}"
            try:
                fields = next(rows)
            except StopIteration:
                return
            except (ValueError, csv.Error) as error:
                yield where, BadRecord(where, f"not CSV ({error})" if isinstance(error, csv.Error) else str(error))
                continue
            if names is None and fields:
                names = _header(chunk, fields, select)
            elif names is not None and len(fields) not in (0, len(names)):
                yield where, BadRecord(where, f"{len(fields)} fields between commas, and the columns are {', '.join(names)}")
            elif names is not None and fields:
                yield where, dict(zip(names, fields, strict=True))


def _header(chunk: Chunk, names: list[str], select: Select | None) -> list[str]:
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{chunk.file.name} has more than one column {repeated!r}: rename or remove all but one")
    if select is not None:
        select(chunk.file.name, names)
    return names


@contextmanager
def _opened(file: DataFile) -> Iterator[BinaryIO]:
    """The file's bytes, those of a .gz decompressed. Raises ValueError if it is damaged."""
    try:
        with gzip.open(file.path) if file.path.suffix == ".gz" else file.path.open("rb") as content:
            yield content  # type: ignore[misc]  # all of a BinaryIO that is used here
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name} is no gzip file, or damaged ({error})") from error


def _checked_line(raw: bytes, file: BinaryIO) -> str:
    """The text of the line that begins with `raw`; the rest of a line that is too long is skipped in `file`."""
    if len(raw) > MAX_LINE_BYTES:
        length = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES)
            length += len(raw)
        raise ValueError(f"a line of {length:,} bytes; the limit is {MAX_LINE_BYTES:,}")
    raw = raw.replace(codecs.BOM_UTF8, b"")  # also where files were concatenated
    if b"\0" in raw:
        raise ValueError(f"a NUL (byte {raw.index(0) + 1} of the line)")
    return _decoded(raw)


# ---- parquet


def parquet_rows(chunk: Chunk, select: Select) -> Rows:
    """Yields a dict of each row's selected columns. Texts stay bytes, so that invalid UTF-8 in one makes only its own row malformed.

    Raises:
        ValueError: it is no parquet file, or `select` refuses its columns.
    """
    with open_parquet(chunk.file) as file:
        columns = list(select(chunk.file.name, names)) if (names := file.schema_arrow.names) else []
        number, groups = chunk.first, range(chunk.start, min(chunk.end, file.metadata.num_row_groups))
        for batch in file.iter_batches(256, row_groups=groups, columns=columns, use_threads=False):
            values = [_as_bytes(batch.column(name)).to_pylist() for name in columns]
            for row in zip(*values, strict=True):
                yield f"{chunk.file.name}:{number}", dict(zip(columns, row, strict=True))
                number += 1


@contextmanager
def open_parquet(file: DataFile) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file.

    Raises:
        ValueError: it is none, or damaged; also for what pyarrow finds while it is read.
    """
    try:
        with pq.ParquetFile(file.path) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns may be damaged too
        raise ValueError(f"{file.name} is not a parquet file, or damaged ({' '.join(str(error).split())})") from error


def _as_bytes(column: pa.Array) -> pa.Array:
    """The same values with bytes in place of texts."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        return column.cast(pa.large_binary())
    if (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and _is_text(column.type.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
