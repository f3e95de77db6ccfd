"""From lines and rows to checked triplets; what is malformed is named by file and line, and reading goes on."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from src.datamodules.files import DataFile
from src.records import Triplet

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is not a record, and is not held in memory to find out."""


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read at one go.

    Attributes:
        file: the file.
        start, end: its first byte, and the one after its last; of a parquet file, row groups; of a .gz, bytes as they are
            unpacked, and any end beyond its own.
        first: number of its first line or row in the file, from 1.
        size: bytes, for progress.
    """

    file: DataFile
    start: int
    end: int
    first: int
    size: int


@dataclass(frozen=True)
class BadRecord:
    """A line or row that is no record: where (file:line, counted from 1), and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Records = Iterator[Triplet | BadRecord]


class Reader(Protocol):
    """Makes triplets of a file's content. A dataclass, so that its settings stand in its `repr` and name a cache."""

    def read(self, chunk: Chunk) -> Records:
        """The records of a chunk, and in place of a malformed one what is wrong with it."""


@dataclass(frozen=True)
class TripletReader:
    """JSON lines or parquet with `query`, `positive`, `negative` (a text or a list of texts) and, if need be, `source`.

    A record without a source has its file's name as one, without suffixes and a shard's number. Blank lines are skipped.

    Attributes:
        negatives: M, how many of a record's negatives are used, the first ones; with 0 it needs none.
    """

    negatives: int = 1

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise ValueError(f"datamodule.reader.negatives={self.negatives}: it must be at least 0")

    def read(self, chunk: Chunk) -> Records:
        rows = parquet_rows(chunk, self.fields()) if chunk.file.path.suffix == ".parquet" else json_rows(chunk)
        for where, values in rows:
            yield values if isinstance(values, BadRecord) else self._checked(where, values, chunk.file)

    def fields(self) -> list[str]:
        """What every record must have."""
        return ["query", "positive", *(["negative"] if self.negatives else [])]

    def _checked(self, where: str, values: Any, file: DataFile) -> Triplet | BadRecord:
        try:
            return self._triplet(where, values, file)
        except ValueError as error:
            return BadRecord(where, str(error))

    def _triplet(self, where: str, values: Any, file: DataFile) -> Triplet:
        if not isinstance(values, dict):
            raise ValueError(f"a record is a JSON object with {', '.join(self.fields())}, not {_kind(values)}")
        missing = [name for name in self.fields() if name not in values]
        if missing:
            raise ValueError(f"no field {', '.join(missing)}")
        negative = values.get("negative", [])
        negative = negative if isinstance(negative, list) else [negative]
        if len(negative) < self.negatives:
            raise ValueError(f"negative has {len(negative)} texts, datamodule.reader.negatives={self.negatives} asks for more")
        texts = [("query", values["query"]), ("positive", values["positive"]), *(("negative", n) for n in negative[: self.negatives])]
        query, positive, *negatives = (checked_text(field, text) for field, text in texts)
        source = values.get("source")
        source = file.stem if source in (None, "", b"") else checked_text("source", source)
        return Triplet(where, query, positive, tuple(negatives), source)


@dataclass(frozen=True)
class SentenceReader:
    """One text a line, as instances without supervision: the text is its own query and positive. Blank lines are skipped."""

    def read(self, chunk: Chunk) -> Records:
        for where, line in text_lines(chunk):
            if isinstance(line, BadRecord):
                yield line
            else:
                text = line.strip()
                yield Triplet(where, text, text, (), chunk.file.stem)


def checked_text(field: str, value: Any) -> str:
    """A value that is text with something in it.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bytes):  # of a parquet file
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


def json_rows(chunk: Chunk) -> Iterator[tuple[str, Any]]:
    """Where each line stands and the value in it, or a BadRecord."""
    for where, line in text_lines(chunk):
        if isinstance(line, BadRecord):
            yield where, line
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            value = BadRecord(where, f"not JSON ({error.msg} at character {error.pos + 1})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
            value = BadRecord(where, f"not JSON that can be read ({error})")
        yield where, value


def text_lines(chunk: Chunk) -> Iterator[tuple[str, str | BadRecord]]:
    """Where each line stands and its text, or a BadRecord; dummy_rollouts lines are left out."""
    with _opened(chunk.file) as file:
        file.seek(chunk.start)
        number = chunk.first
        while file.tell() < chunk.end and (raw := file.readline(MAX_LINE_BYTES + 1)):
            where = f"{chunk.file.name}:{number}"
            try:
                line = _checked_line(raw, file, first=number == 1)
            except ValueError as error:
                yield where, BadRecord(where, str(error))
            else:
                if line.strip():
                    yield where, line
            number += 1


@contextmanager
def _opened(file: DataFile) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where it is a .gz.

    Raises:
        ValueError: it is damaged.
    """
    if file.path.suffix != ".gz":
        with file.path.open("rb") as plain:
            yield plain
        return
    try:
        with gzip.open(file.path) as unpacked:
            yield unpacked  # type: ignore[misc]  # all of a BinaryIO that is used here
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name} is no gzip file, or damaged ({error})") from error


def _checked_line(raw: bytes, file: BinaryIO, first: bool) -> str:
    """The line that begins with `raw`; the rest of one that is too long is read from `file`."""
    if len(raw) > MAX_LINE_BYTES:
        length = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES)
            length += len(raw)
        raise ValueError(f"a line of {length:,} bytes; the longest that is read has {MAX_LINE_BYTES:,}")
    if first:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        raise ValueError(f"a NUL (byte {raw.index(0) + 1} of the line)")
    return _decoded(raw)


# ---- parquet


def parquet_rows(chunk: Chunk, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands and its values; texts as bytes, so that one that is not UTF-8 spoils no other.

    Raises:
        ValueError: not a parquet file, or one without a column that is needed.
    """
    with _named_errors(chunk.file), open_parquet(chunk.file) as file:
        there = file.schema_arrow.names
        missing = [name for name in needed if name not in there]
        if missing:
            raise ValueError(f"{chunk.file.name} has no column {', '.join(missing)}; it has {', '.join(there)}")
        columns = [name for name in ("query", "positive", "negative", "source") if name in there]
        number = chunk.first
        for batch in file.iter_batches(256, row_groups=range(chunk.start, chunk.end), columns=columns, use_threads=False):
            values = [_undecoded(batch.column(name)).to_pylist() for name in columns]
            for row in zip(*values, strict=True):
                yield f"{chunk.file.name}:{number}", dict(zip(columns, row, strict=True))
                number += 1


def open_parquet(file: DataFile) -> pq.ParquetFile:
    """The open file.

    Raises:
        ValueError: not a parquet file.
    """
    with _named_errors(file):
        return pq.ParquetFile(file.path)


@contextmanager
def _named_errors(file: DataFile) -> Iterator[None]:
    """What pyarrow says of bytes that are no parquet, as one line with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # its names of columns may be damaged too
        raise ValueError(f"{file.name} is not a parquet file, or damaged ({' '.join(str(error).split())})") from error


def _undecoded(column: pa.Array) -> pa.Array:
    """The same values with bytes in place of texts."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        value = column.type.value_type
        if pa.types.is_string(value) or pa.types.is_large_string(value):
            return column.cast(pa.large_list(pa.large_binary()))
    return column
