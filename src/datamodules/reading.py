"""Reads files into checked triplets. A malformed record is yielded as a BadRecord with file and line, and reading goes on."""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from src.datamodules.files import DataFile
from src.records import Triplet

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


class Reader(Protocol):
    """Makes triplets of a file's content. A dataclass: its `repr` is part of the name of a prepared folder."""

    def read(self, chunk: Chunk) -> Iterator[Triplet | BadRecord]:
        """Yields the records of a chunk, malformed ones as BadRecord."""


@dataclass(frozen=True)
class TripletReader:
    """Reads JSON lines or parquet with `query`, `positive`, `negative` (a text or a list of texts) and optionally `source`.

    A record without a source gets the stem of its file. Blank lines are skipped.

    Attributes:
        negatives: M, the number of a record's negatives that are used, the first ones; 0 makes `negative` optional.
    """

    negatives: int = 1

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise ValueError(f"datamodule.reader.negatives={self.negatives}: it must be at least 0")

    def read(self, chunk: Chunk) -> Iterator[Triplet | BadRecord]:
        rows = parquet_rows(chunk, self.fields()) if chunk.file.path.suffix == ".parquet" else json_rows(chunk)
        return (record for _, record in parsed(rows, partial(self._triplet, chunk.file)))

    def fields(self) -> list[str]:
        """The fields that every record must have."""
        return ["query", "positive", *(["negative"] if self.negatives else [])]

    def _triplet(self, file: DataFile, where: str, values: Any) -> Triplet:
        if not isinstance(values, dict):
            raise ValueError(f"a record is a JSON object with {', '.join(self.fields())}, not {_kind(values)}")
        missing = [name for name in self.fields() if name not in values]
        if missing:
            raise ValueError(f"no field {', '.join(missing)}")
        negative = values.get("negative", [])
        negative = negative if isinstance(negative, list) else [negative]
        if len(negative) < self.negatives:
            raise ValueError(f"negative has {len(negative)} texts, datamodule.reader.negatives={self.negatives} asks for more")
        query, positive = (checked_text(name, values[name]) for name in ("query", "positive"))
        texts = (checked_text("negative", text) for text in negative)
        negatives = tuple(islice((text for text in texts if text.strip() != positive.strip()), self.negatives))
        if len(negatives) < self.negatives:
            raise ValueError("a negative equals the positive, and would cancel what it teaches")
        source = values.get("source")
        return Triplet(where, query, positive, negatives, file.stem if source in (None, "", b"") else checked_text("source", source))


@dataclass(frozen=True)
class SentenceReader:
    """Reads one text a line, which is its own query and positive (unsupervised). Blank lines are skipped.

    A line that is a JSON object, as in a file of JSON lines, gives the text of a field.

    Attributes:
        field: its name.
    """

    field: str = "text"

    def read(self, chunk: Chunk) -> Iterator[Triplet | BadRecord]:
        return (record for _, record in parsed(text_lines(chunk), partial(self._triplet, chunk.file)))

    def _triplet(self, file: DataFile, where: str, line: str) -> Triplet:
        text = line.strip()
        if text.startswith("{") and text.endswith("}"):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                values = None  # a sentence in braces
            if isinstance(values, dict):
                if self.field not in values:
                    raise ValueError(
                        f"a JSON object without the field {self.field!r}; it has {', '.join(values)} (datamodule.reader.field)"
                    )
                text = checked_text(self.field, values[self.field]).strip()
        return Triplet(where, text, text, (), file.stem)


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
    """Returns a value that is a non-empty text; bytes, which parquet gives, are decoded.

    Raises:
        ValueError: it is no text, is blank, or holds a NUL, invalid UTF-8 or half of a surrogate pair.
    """
    if isinstance(value, bytes):
        value = _decoded(value, f"{field} is ")
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{field} is empty")
    if "\0" in value:
        raise ValueError(f"{field} has a NUL character")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{field} has half of a surrogate pair, which is no character")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _decoded(raw: bytes, what: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x})") from error


# ---- lines


def json_rows(chunk: Chunk) -> Rows:
    """Yields the JSON value of each line."""
    return parsed(text_lines(chunk), _json_value)


def _json_value(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise ValueError(f"not JSON that can be read ({error})") from error


def tsv_rows(chunk: Chunk, names: Sequence[str] | None = None) -> Rows:
    """Yields the fields of each line, a dict of text by column. Fields stand between tabs, and quotes have no meaning.

    Args:
        names: of the columns; if None, the first line names them.
    """
    for where, line in text_lines(chunk):
        fields = [] if isinstance(line, BadRecord) else line.rstrip("\r\n").split("\t")
        if isinstance(line, BadRecord):
            yield where, line
        elif names is None:
            names = fields
        elif len(fields) != len(names):
            yield where, BadRecord(where, f"{len(fields)} fields between tabs, and the columns are {', '.join(names)}")
        else:
            yield where, dict(zip(names, fields, strict=True))


def text_lines(chunk: Chunk) -> Rows:
    """Yields the text of each line that is not blank."""
    with _opened(chunk.file) as file:
        file.seek(chunk.start)
        number = chunk.first
        while file.tell() < chunk.end and (raw := file.readline(MAX_LINE_BYTES + 1)):
            where = f"{chunk.file.name}:{number}"
            try:
                line: str | BadRecord = _checked_line(raw, file)
            except ValueError as error:
                line = BadRecord(where, str(error))
            if isinstance(line, BadRecord) or line.strip():
                yield where, line
            number += 1


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


def parquet_rows(chunk: Chunk, needed: Sequence[str]) -> Rows:
    """Yields a dict of each row. Texts stay bytes, so that invalid UTF-8 in one makes only its own row malformed.

    Raises:
        ValueError: it is no parquet file, or lacks a column that is needed.
    """
    with open_parquet(chunk.file) as file:
        found = file.schema_arrow.names
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(f"{chunk.file.name} has no column {', '.join(missing)}; it has {', '.join(found)}")
        columns = [name for name in ("query", "positive", "negative", "source") if name in found]
        number = chunk.first
        for batch in file.iter_batches(256, row_groups=range(chunk.start, chunk.end), columns=columns, use_threads=False):
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
