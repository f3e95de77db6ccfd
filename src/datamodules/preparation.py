"""Once for each content and setting: files are read, checked and filtered by length, in parallel, into Arrow files."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
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

from src.datamodules.atomic import written_aside
from src.datamodules.files import DataFile
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import BadRecord, Chunk, Reader, open_parquet
from src.records import Triplet

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {"id": pa.string(), "query": pa.string(), "positive": pa.string(), "negatives": pa.list_(pa.string()), "source": pa.string()}
)
"""The columns of a prepared file: the fields of Triplet."""

SHOWN = 20
"""How many bad records a report names; all of them stand in MALFORMED."""

MALFORMED = "malformed.txt"
"""Every bad record as `file:line: reason`, in a prepared folder that has any."""

_FORMAT = 2  # raise when what is prepared changes, so that older folders are not read
_CHUNK_BYTES = 8 * 2**20
_BATCH_RECORDS, _BATCH_CHARACTERS = 512, 4 * 2**20  # what is tokenised at a time
_REPORT_FILE = "report.json"
_BAD_SUFFIX = ".bad"  # of a chunk's malformed records, until they are joined


@dataclass
class Report:
    """What became of the records of some files.

    Attributes:
        records: lines (but for dummy_rollouts ones) and rows.
        kept: those that training can use.
        too_long: those with a text whose prompt is longer than the limit.
        bad: malformed ones.
        first_bad: the first of them, each as `file:line: reason`.
        all_bad: the file that lists all of them.
    """

    records: int = 0
    kept: int = 0
    too_long: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    all_bad: str = field(default="", compare=False)

    def add(self, other: "Report") -> None:
        """Counts what came next."""
        self.records += other.records
        self.kept += other.kept
        self.too_long += other.too_long
        self.bad += other.bad
        self.first_bad = [*self.first_bad, *other.first_bad][:SHOWN]

    def bad_lines(self) -> str:
        """The first bad records, one a line, and where the others are listed."""
        more = [f"  and {self.bad - len(self.first_bad):,} more, see {self.all_bad}"] if self.bad > len(self.first_bad) else []
        return "\n".join([*(f"  {line}" for line in self.first_bad), *more])


def scan(file: DataFile) -> tuple[str, list[Chunk]]:
    """The digest of a file's content, and how it is cut for reading: at line ends every 8 MiB, or between row groups.

    A .gz is read from its beginning, so it is one chunk: several of them are read in parallel, one is not.
    """
    digest = hashlib.sha256()
    chunks: list[Chunk] = []
    with file.path.open("rb") as content:
        start, first, position, lines = 0, 1, 0, 0
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
    if file.path.suffix == ".parquet":
        chunks = _row_groups(file)
    elif file.path.suffix == ".gz":
        chunks = [Chunk(file, 0, sys.maxsize, 1, position)]
    return digest.hexdigest(), chunks


def _row_groups(file: DataFile) -> list[Chunk]:
    with open_parquet(file) as parquet:
        metadata = parquet.metadata
        chunks, first = [], 1
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            chunks.append(Chunk(file, i, i + 1, first, group.total_byte_size))
            first += group.num_rows
    return chunks


def prepare(files: Sequence[DataFile], reader: Reader, limit: PromptLimit, cache_dir: Path | str, num_proc: int | None = None) -> Path:
    """The folder with the prepared records of `files`, in their order: *.arrow, report.json and, of malformed ones, MALFORMED.

    Its name is a digest of the files' names and content, the reader, the tokenizer and the limit; where it exists already,
    nothing is done. It is written aside and renamed, so it is whole or not there; what a killed process has left aside is
    removed by the next that prepares the same.

    Args:
        num_proc: processes; None for one a core.

    Raises:
        ValueError: a parquet file that is none, or lacks a column. Malformed records are reported, not raised.
    """
    scanned = [scan(file) for file in files]
    settings = [_FORMAT, repr(reader), limit.key, [(file.name, digest) for file, (digest, _) in zip(files, scanned, strict=True)]]
    folder = Path(cache_dir) / f"prepared_{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    chunks = [chunk for _, parts in scanned for chunk in parts]
    processes = max(1, min(num_proc or _cores(), len(chunks)))
    log.info("preparing %s (once; kept in %s), %d processes", _names(files), folder, processes)
    with written_aside(folder) as work:
        report = Report()
        for part in _with_progress(chunks, _prepare_all(chunks, _Worker(reader, limit, work), processes)):
            report.add(part)
        _join(sorted(work.glob(f"*{_BAD_SUFFIX}")), work / MALFORMED)
        Path(work, _REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, and its result is the same
                raise
    return folder


def load_report(folder: Path) -> Report:
    """The report of a prepared folder."""
    values = json.loads(Path(folder, _REPORT_FILE).read_text(encoding="utf-8"))
    return Report(**values | {"all_bad": str(folder / MALFORMED)})


def _join(parts: Sequence[Path], whole: Path) -> None:
    """The parts one after the other in one file, and gone themselves; no file of no parts."""
    if not parts:
        return
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file)
            part.unlink()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(files: Sequence[DataFile]) -> str:
    names = ", ".join(file.name for file in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3} more files"


# ---- in parallel


@dataclass(frozen=True)
class _Worker:
    """What every process needs.

    Attributes:
        folder: where the Arrow files go.
    """

    reader: Reader
    limit: PromptLimit
    folder: Path

    def __call__(self, index: int, chunk: Chunk) -> Report:
        """Reads a chunk and writes what is kept of it."""
        report = Report()
        with pa.OSFile(str(self.folder / f"{index:06d}.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for records in in_batches(self.reader.read(chunk)):
                triplets = [record for record in records if isinstance(record, Triplet)]
                bad = [str(record) for record in records if isinstance(record, BadRecord)]
                self._list(index, bad)
                kept = self.limit.within(triplets)
                if kept:
                    writer.write_batch(
                        pa.RecordBatch.from_pydict({name: [getattr(t, name) for t in kept] for name in SCHEMA.names}, SCHEMA)
                    )
                report.add(Report(len(records), len(kept), len(triplets) - len(kept), len(bad), bad))
        return report

    def _list(self, index: int, bad: Sequence[str]) -> None:
        if bad:
            with Path(self.folder, f"{index:06d}{_BAD_SUFFIX}").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in bad)


def in_batches(records: Iterable[Triplet | BadRecord]) -> Iterator[list[Triplet | BadRecord]]:
    """Lists of records, bounded in number and in characters: a batch of very long texts would fill the memory."""
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


_worker: _Worker | None = None  # of this process


def _start_process(worker: _Worker) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent would leave its processes waiting for ever, with what they hold."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(index: int, chunk: Chunk) -> Report:
    if _worker is None:
        raise RuntimeError("this process was not started by `prepare`")
    return _worker(index, chunk)


def _prepare_all(chunks: Sequence[Chunk], worker: _Worker, processes: int) -> Iterator[Report]:
    """The chunks' reports in their order, however many processes there are."""
    if processes == 1:
        yield from map(worker, range(len(chunks)), chunks)
        return
    with _one_thread_each(), ProcessPoolExecutor(processes, initializer=_start_process, initargs=(worker,)) as pool:
        try:
            yield from pool.map(_in_process, range(len(chunks)), chunks)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that prepares the data was killed, most often for want of memory; nothing half done was kept. Start again, with "
                f"a datamodule.num_proc below {processes} if that was it"
            ) from error


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tokenizers without threads of their own: the processes are the parallelism, and forked threads are complained about."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _with_progress(chunks: Sequence[Chunk], reports: Iterator[Report]) -> Iterator[Report]:
    columns = ("preparing", BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(chunk.size for chunk in chunks))
        for chunk, report in zip(chunks, reports, strict=True):
            progress.advance(task, chunk.size)
            yield report
