"""Prepares data once per content and settings: files are read, checked and filtered by length, in parallel, into Arrow files."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from src.datamodules.files import DataFile
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import Reader, Tally
from src.datamodules.rows import BadRecord, Chunk, open_parquet
from src.records import Triplet
from src.utils.atomic import make_folder_once

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {"id": pa.string(), "query": pa.string(), "positive": pa.string(), "negatives": pa.list_(pa.string()), "source": pa.string()}
)
"""The columns of a prepared file: the fields of Triplet."""

SHOWN = 20
"""The number of bad records that a report shows; MALFORMED lists all of them."""

MALFORMED = "malformed.txt"
"""The file in a prepared folder with every bad record as `file:line: reason`; absent if there are none."""

_FORMAT = 4  # raise when the prepared content changes, so that older folders are not used
_CHUNK_BYTES = 8 * 2**20
_BATCH_RECORDS, _BATCH_CHARACTERS = 512, 4 * 2**20  # tokenised at once
_REPORT_FILE = "report.json"
_BAD_SUFFIX = ".bad"  # of the malformed records of one chunk, which MALFORMED joins


@dataclass(frozen=True)
class Report:
    """Counts of the records of some files.

    Attributes:
        records: rows, and lines that are not blank.
        kept: those that can be trained on.
        too_long: those with a text whose prompt is longer than the limit.
        bad: malformed ones.
        equal_negatives: negatives that were left out of records because they equal the query or the positive.
        first_bad: the first SHOWN of them, as `file:line: reason`.
        all_bad: path of the file that lists all of them.
        digest: of the files' content, 16 hexadecimal digits; empty in folders that earlier versions prepared.
    """

    records: int = 0
    kept: int = 0
    too_long: int = 0
    bad: int = 0
    equal_negatives: int = 0
    first_bad: list[str] = field(default_factory=list)
    all_bad: str = field(default="", compare=False)
    digest: str = field(default="", compare=False)

    def __add__(self, other: "Report") -> "Report":
        names = ("records", "kept", "too_long", "bad", "equal_negatives")
        counts = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Report(**counts, first_bad=[*self.first_bad, *other.first_bad][:SHOWN])

    def bad_lines(self) -> str:
        """The first bad records, one a line, and where all are listed."""
        more = [f"  and {self.bad - len(self.first_bad):,} more, see {self.all_bad}"] if self.bad > len(self.first_bad) else []
        return "\n".join([*(f"  {line}" for line in self.first_bad), *more])


def prepare(files: Sequence[DataFile], reader: Reader, limit: PromptLimit, cache_dir: Path | str, num_proc: int | None = None) -> Path:
    """Returns the folder with the prepared records of `files`, in their order; makes it if it does not exist.

    It holds *.arrow, report.json and, if records are malformed, MALFORMED. Its name is a digest of the files' names and
    content, the reader, the tokenizer and the limit.

    Args:
        num_proc: processes; None for one a core.

    Raises:
        ValueError: a file is damaged, or a parquet file lacks a column. Malformed records are reported, not raised.
        RuntimeError: a process was killed.
    """
    scanned = [scan(file) for file in files]
    settings = [_FORMAT, repr(reader), limit.key, [(file.name, digest) for file, (digest, _) in zip(files, scanned, strict=True)]]
    folder = Path(cache_dir) / f"prepared_{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
    content = hashlib.sha256(json.dumps([digest for digest, _ in scanned]).encode()).hexdigest()[:16]
    chunks = [chunk for _, parts in scanned for chunk in parts]
    processes = max(1, min(num_proc or _cores(), len(chunks)))

    def write(work: Path) -> None:
        names = ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")
        log.info("preparing %s (once; kept in %s), %d processes", names, folder, processes)
        columns = ("preparing", BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=sum(chunk.size for chunk in chunks))
            report = Report()
            for chunk, part in zip(chunks, _prepare_all(chunks, _Worker(reader, limit, work), processes), strict=True):
                report += part
                progress.advance(task, chunk.size)
        _join(sorted(work.glob(f"*{_BAD_SUFFIX}")), work / MALFORMED)
        (work / _REPORT_FILE).write_text(json.dumps(asdict(report) | {"digest": content}, indent=2) + "\n", encoding="utf-8")

    return make_folder_once(folder, write)


def load_report(folder: Path) -> Report:
    """Returns the report of a prepared folder."""
    values = json.loads((folder / _REPORT_FILE).read_text(encoding="utf-8"))
    return Report(**values | {"all_bad": str(folder / MALFORMED)})


def scan(file: DataFile) -> tuple[str, list[Chunk]]:
    """Returns the digest of a file's content, and its chunks: cut at line ends about every 8 MiB, or between row groups.

    A .gz, CSV or TSV can only be read from its beginning, which says how the rest is compressed or what its columns are: it is one chunk.
    """
    digest = hashlib.sha256()
    chunks: list[Chunk] = []
    start, first, position, lines = 0, 1, 0, 0
    with file.path.open("rb") as content:
        while block := content.read(_CHUNK_BYTES):
            digest.update(block)
            if last := block.rfind(b"\n") + 1:
                end = position + last
                chunks.append(Chunk(file, start, end, first, end - start))
                lines += block.count(b"\n")
                start, first = end, lines + 1
            position += len(block)
    if start < position:
        chunks.append(Chunk(file, start, position, first, position - start))
    if file.format == "parquet":
        chunks = _row_groups(file)
    elif file.path.suffix == ".gz" or file.format in ("csv", "tsv"):
        chunks = [Chunk(file, size=position)]
    return digest.hexdigest(), chunks


def _row_groups(file: DataFile) -> list[Chunk]:
    chunks, first = [], 1
    with open_parquet(file) as parquet:
        for i in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(i)
            chunks.append(Chunk(file, i, i + 1, first, group.total_byte_size))
            first += group.num_rows
    return chunks


def _join(parts: Sequence[Path], joined: Path) -> None:
    """Moves the content of the parts into one file; makes none if there are no parts."""
    for part in parts:
        with joined.open("ab") as file, part.open("rb") as content:
            shutil.copyfileobj(content, file)
        part.unlink()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- in parallel


@dataclass(frozen=True)
class _Worker:
    """Prepares chunks; `folder` is where the Arrow files go."""

    reader: Reader
    limit: PromptLimit
    folder: Path

    def __call__(self, index: int, chunk: Chunk) -> Report:
        report, tally = Report(), Tally()
        with pa.OSFile(str(self.folder / f"{index:06d}.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for records in in_batches(self.reader.read(chunk, tally)):
                triplets = [record for record in records if isinstance(record, Triplet)]
                bad = [str(record) for record in records if isinstance(record, BadRecord)]
                if bad:
                    with (self.folder / f"{index:06d}{_BAD_SUFFIX}").open("a", encoding="utf-8", errors="backslashreplace") as listed:
                        listed.writelines(f"{line}\n" for line in bad)
                kept = self.limit.within(triplets)
                if kept:
                    writer.write_batch(
                        pa.RecordBatch.from_pydict({name: [getattr(t, name) for t in kept] for name in SCHEMA.names}, SCHEMA)
                    )
                report += Report(len(records), len(kept), len(triplets) - len(kept), len(bad), first_bad=bad)
        return report + Report(equal_negatives=tally["equal_negatives"])


def in_batches(records: Iterable[Triplet | BadRecord]) -> Iterator[list[Triplet | BadRecord]]:
    """Yields lists of records, limited in number and, since they are tokenised in memory, in characters."""
    batch: list[Triplet | BadRecord] = []
    characters = 0
    for record in records:
        batch.append(record)
        if isinstance(record, Triplet):
            characters += sum(map(len, record.texts))
        if len(batch) >= _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker: _Worker | None = None  # of this process: a tokenizer is too large to be sent with every chunk


def _start_process(worker: _Worker) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(index: int, chunk: Chunk) -> Report:
    if _worker is None:
        raise RuntimeError("this process was not started by `prepare`")
    return _worker(index, chunk)


def _prepare_all(chunks: Sequence[Chunk], worker: _Worker, processes: int) -> Iterator[Report]:
    """Yields the chunks' reports in their order."""
    if processes == 1:
        yield from map(worker, range(len(chunks)), chunks)
        return
    with _single_threaded_tokenizers(), ProcessPoolExecutor(processes, initializer=_start_process, initargs=(worker,)) as pool:
        try:
            yield from pool.map(_in_process, range(len(chunks)), chunks)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that prepares the data was killed, most often for lack of memory; nothing incomplete was kept. Start again, "
                f"if that was the reason with a datamodule.num_proc below {processes}"
            ) from error


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Turns off the threads of tokenizers: the processes already use all cores, and forking beside threads makes it warn."""
    before = os.environ.pop("TOKENIZERS_PARALLELISM", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}
