"""Preparation in parallel, its cache, and what killed processes leave."""

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from src.datamodules import preparation
from src.datamodules.files import DataFile
from src.datamodules.preparation import MALFORMED, SHOWN, Report, in_batches, load_report, prepare, scan
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import SentenceReader, Tally, TripletReader
from src.datamodules.rows import BadRecord, Chunk, json_rows
from src.modules.prompt.renderer import PromptRenderer
from src.records import Triplet
from tests.builders import SENTENCES, small_tokenizer
from tests.datamodules.builders import all_triplets, limit, write


def sentences(folder: Path, count: int, name: str = "text.txt") -> DataFile:
    """Every tenth line is blank, every 7th is not UTF-8, and lengths vary."""
    lines = [
        b"" if i % 10 == 0 else b"\xff" if i % 7 == 0 else (SENTENCES[i % 5][: 5 + i % 60] + f" {i}").encode() for i in range(1, count + 1)
    ]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return DataFile(folder / name, name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_CHUNK_BYTES", 1000)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_cover_a_file_once(tmp_path):
    lines = [json.dumps({"n": i, "fill": "x" * (i * 37 % 300)}) for i in range(1, 200)]
    lines[50] = json.dumps({"n": 51, "fill": "x" * 5000})  # longer than a block
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))  # the last line has no end
    digest, chunks = scan(DataFile(path, "data.jsonl"))
    assert len(chunks) > 10
    assert (chunks[0].start, chunks[-1].end) == (0, path.stat().st_size)
    assert all(a.end == b.start for a, b in pairwise(chunks))
    found = [row for chunk in chunks for row in json_rows(chunk)]
    assert [(where, value["n"]) for where, value in found] == [(f"data.jsonl:{i}", i) for i in range(1, 200)]
    path.write_text("\n".join(lines) + " ")
    assert scan(DataFile(path, "data.jsonl"))[0] != digest


@pytest.mark.usefixtures("small_chunks")
def test_processes_prepare_what_one_does(tmp_path):
    file = sentences(tmp_path, 300)
    one, two = (prepare([file], SentenceReader(), limit(), tmp_path / str(n), num_proc=n) for n in (1, 2))
    assert one.name == two.name
    assert len(list(one.glob("*.arrow"))) > 5
    assert all_triplets(one) == all_triplets(two)
    report = load_report(one)
    assert report == load_report(two)
    assert (report.records, report.bad) == (270, 38)
    assert report.kept + report.too_long + report.bad == report.records
    assert min(report.kept, report.too_long) > 50
    listed = [f"text.txt:{i}: not UTF-8 (byte 1 is 0xff)" for i in range(7, 301, 7) if i % 10]
    assert (one / MALFORMED).read_text().splitlines() == (two / MALFORMED).read_text().splitlines() == listed
    assert report.first_bad == listed[:SHOWN]
    assert report.bad_lines().endswith(f"\n  and 18 more, see {one / MALFORMED}")
    assert {file.suffix for file in two.iterdir()} == {".arrow", ".json", ".txt"}


def test_cache_key(tmp_path, monkeypatch):
    def prepared(file=None, reader=None, num_proc=None, **limits):
        return prepare([file or text], reader or SentenceReader(), limit(**limits), tmp_path / "cache", num_proc)

    text = sentences(tmp_path, 40)
    folder = prepared()
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_prepare_all", lambda *_: pytest.fail("prepared again"))
        assert prepared(num_proc=2) == prepared(instruction="Name the terms!") == folder
    others = [
        prepared(max_prompt_tokens=38),
        prepared(instruction="Name the terms, one by one"),
        prepared(DataFile(text.path, "other.txt")),
        prepared(reader=TripletReader(1)),
        prepared(reader=TripletReader(2)),
        prepared(sentences(tmp_path, 41)),
    ]
    assert len({folder, *others}) == 7
    assert {path for path in (tmp_path / "cache").iterdir() if path.is_dir()} == {folder, *others}


def test_limit_is_the_renderers(tmp_path):
    texts = [SENTENCES[i % 5][:i] + " <|im_end|> " * (i % 3) for i in range(1, 70)]
    lengths = PromptRenderer(small_tokenizer(), "Name the terms.", 1000)(texts).lengths.tolist()
    assert min(lengths) < 50 < max(lengths)
    for most in (min(lengths), 50, max(lengths)):
        assert limit(most).fits(texts) == [length <= most for length in lengths]
    assert limit().fits([]) == []


@pytest.mark.parametrize("field", ["query", "positive", "negative"])
def test_every_text_is_measured(tmp_path, field):
    record = {"query": "a", "positive": "b", "negative": ["c", "d", "e"]}
    long = "many words " * 30
    too_long = {**record, field: ["c", long, "e"] if field == "negative" else long}
    file = DataFile(write(tmp_path / "data.jsonl", record, too_long), "data.jsonl")
    assert load_report(prepare([file], TripletReader(2), limit(), tmp_path)) == Report(records=2, kept=1, too_long=1)
    unused = load_report(prepare([file], TripletReader(1), limit(), tmp_path))  # the long negative is the second
    assert unused.too_long == (field != "negative")


def test_batches_are_bounded():
    short = [Triplet(str(i), "a", "a") for i in range(1100)]
    assert [len(batch) for batch in in_batches(short)] == [512, 512, 76]
    long = [Triplet(str(i), "a", "b" * 2**21) for i in range(5)]
    assert [len(batch) for batch in in_batches(long)] == [2, 2, 1]


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no policy at '.*policy\.path"):
        PromptLimit.load(str(tmp_path / "none"), "Name the terms.", 60)


class KilledByOne(SentenceReader):
    """A reader whose process is killed in its second chunk, as the system kills one that takes too much memory."""

    def read(self, chunk: Chunk, tally: Tally | None = None) -> Iterator[Triplet | BadRecord]:
        if chunk.start > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(chunk, tally)


@pytest.mark.usefixtures("small_chunks")
def test_killed_process(tmp_path):
    file = sentences(tmp_path, 300)
    with pytest.raises(RuntimeError, match=r"^.*was killed.* datamodule.num_proc below 2$"):
        prepare([file], KilledByOne(), limit(), tmp_path / "cache", num_proc=2)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert len(all_triplets(prepare([file], SentenceReader(), limit(), tmp_path / "cache", num_proc=2))) > 0


STUCK = """
import sys, time
from pathlib import Path
from src.datamodules import preparation
from src.datamodules.files import DataFile
from tests.datamodules.builders import limit
from tests.datamodules.test_preparation import Stuck
preparation._CHUNK_BYTES = 1000
path = Path(sys.argv[1])
preparation.prepare([DataFile(path, path.name)], Stuck(), limit(), sys.argv[2], num_proc=2)
"""


class Stuck(SentenceReader):
    """A reader that hangs in its second chunk, and has the name, and so the cache folder, of one that does not."""

    def read(self, chunk: Chunk, tally: Tally | None = None) -> Iterator[Triplet | BadRecord]:
        if chunk.start > 0:
            time.sleep(600)
        return super().read(chunk, tally)

    def __repr__(self) -> str:
        return repr(SentenceReader())


@pytest.mark.usefixtures("small_chunks")
def test_killed_preparation_is_cleaned_up(programs, tmp_path):
    file, cache = sentences(tmp_path, 300), tmp_path / "cache"
    stuck, until = programs.start("-c", STUCK, str(file.path), str(cache)), time.monotonic() + 240
    while not list(cache.rglob("*.arrow")):
        assert stuck.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(Timeout):  # another run would wait
        FileLock(next(cache.glob("*.lock")), timeout=0.1).acquire()
    stuck.send_signal(signal.SIGKILL)
    folder = prepare([file], SentenceReader(), limit(), cache)  # once its processes have ended
    assert len(all_triplets(folder)) > 0
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]
