"""Every kind of malformed record, with the line or row that is reported."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.files import DataFile
from src.datamodules.preparation import scan
from src.datamodules.reading import BadRecord, Reader, SentenceReader, TripletReader
from src.records import Triplet

GOOD = {"query": "what is a fox", "positive": "a fox is an animal", "negative": ["a box is a thing", "a sock"], "source": "zoo"}


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def read(reader: Reader, path: Path) -> list[Triplet | BadRecord]:
    file = DataFile(path, path.name)
    return [record for chunk in scan(file)[1] for record in reader.read(chunk)]


def test_good_lines(tmp_path):
    file = write(tmp_path / "data.jsonl", GOOD, b"", b"  \r", {**GOOD, "negative": "one text", "source": None, "more": 1})
    first, second = read(TripletReader(), file)
    assert first == Triplet("data.jsonl:1", GOOD["query"], GOOD["positive"], ("a box is a thing",), "zoo")
    assert second == Triplet("data.jsonl:4", GOOD["query"], GOOD["positive"], ("one text",), "data")
    (_, second) = read(TripletReader(negatives=0), write(file, GOOD, {"query": "q", "positive": "p"}))
    assert second.negatives == ()


def test_packed_lines_are_read_as_those_that_are_not(tmp_path):
    lines = [GOOD, b"", {**GOOD, "query": "Gr\u00f6\u00dfe", "source": None}, b"\xff", b"x" * 9_000_000, GOOD]
    plain = write(tmp_path / "data.jsonl", *lines)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()[:700]) + gzip.compress(plain.read_bytes()[700:]))  # as `cat` joins two
    expected = [str(record).replace("data.jsonl:", "data.jsonl.gz:") for record in read(TripletReader(), plain)]
    assert [str(record) for record in read(TripletReader(), packed)] == expected
    (tmp_path / "data.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert [record.query for record in read(SentenceReader(), tmp_path / "data.txt.gz")] == ["one", "two"]


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-20], lambda whole: whole[:40] + b"?" + whole[41:], lambda whole: b"plain" + whole]
)
def test_a_damaged_packed_file_is_named(tmp_path, damage):
    packed = gzip.compress("".join(f"text {i * 7919}\n" for i in range(1000)).encode())
    (tmp_path / "data.txt.gz").write_bytes(damage(packed))
    with pytest.raises(ValueError, match=r"^data\.txt\.gz is no gzip file, or damaged") as caught:
        read(SentenceReader(), tmp_path / "data.txt.gz")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_while_it_is_read_ends(tmp_path):
    file = write(tmp_path / "data.jsonl", GOOD, GOOD)
    (chunk,) = scan(DataFile(file, file.name))[1]
    write(file, GOOD)
    assert len(list(TripletReader().read(chunk))) == 1


def test_windows_files_and_a_last_line_without_an_end(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps({**GOOD, "query": "Größe"}).encode())
    assert [record.query for record in read(TripletReader(), file)] == ["what is a fox", "Größe"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes at character"),
        (b'{"query": "a"} {"query": "b"}', "not JSON (Extra data"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"1" * 10_000, "not JSON that can be read"),
        (b"[]", "a record is a JSON object with query, positive, negative, not a list"),
        (b'{"query": "\xff"}', "not UTF-8 (byte 12 is 0xff)"),
        (b'{"query": "\x00"}', "a NUL (byte 12 of the line)"),
        (b'{"query": "a\\u0000b", "positive": "p", "negative": "n"}', "query has a NUL character"),
        (b'{"query": "a\\ud800b", "positive": "p", "negative": "n"}', "query has half of a surrogate pair"),
        ({"query": "a", "positive": "b"}, "no field negative"),
        ({}, "no field query, positive, negative"),
        ({**GOOD, "query": 3}, "query must be text, not a number"),
        ({**GOOD, "positive": None}, "positive must be text, not null"),
        ({**GOOD, "positive": ["a"]}, "positive must be text, not a list"),
        ({**GOOD, "negative": {"text": "a"}}, "negative must be text, not an object"),
        ({**GOOD, "negative": [3]}, "negative must be text, not a number"),
        ({**GOOD, "negative": []}, "negative has 0 texts, datamodule.reader.negatives=1 asks for more"),
        ({**GOOD, "query": ""}, "query is empty"),
        ({**GOOD, "positive": " \u3000"}, "positive is empty"),
        ({**GOOD, "negative": [""]}, "negative is empty"),
        ({**GOOD, "source": 3}, "source must be text, not a number"),
        (b"x" * 10_000_000, "a line of 10,000,001 bytes; the longest that is read has 8,388,608"),
        ({**GOOD, "positive": "x" * 10_000_000}, "a line of 10,000,"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_line_is_named_and_those_around_it_are_read(tmp_path, line, reason):
    before, bad, after = read(TripletReader(), write(tmp_path / "data.jsonl", b"", GOOD, line, GOOD))
    assert (before.id, bad.where, after.id) == ("data.jsonl:2", "data.jsonl:3", "data.jsonl:4")
    assert bad.reason.startswith(reason)


def test_sentences(tmp_path):
    lines = (b"One sentence. ", b"", b"caf\xc3\xa9", b"caf\xe9", b"a\x00b", b"x" * 10_000_000, b"The last.")
    records = read(SentenceReader(), write(tmp_path / "wiki.txt", *lines))
    assert records[0] == Triplet("wiki.txt:1", "One sentence.", "One sentence.", (), "wiki")
    assert [r.query for r in records if isinstance(r, Triplet)] == ["One sentence.", "café", "The last."]
    assert [str(r) for r in records if isinstance(r, BadRecord)] == [
        "wiki.txt:4: not UTF-8 (byte 4 is 0xe9)",
        "wiki.txt:5: a NUL (byte 2 of the line)",
        "wiki.txt:6: a line of 10,000,001 bytes; the longest that is read has 8,388,608",
    ]
    assert records[-1].id == "wiki.txt:7"


# ---- parquet


def table(**columns: object) -> pa.Table:
    return pa.table({"query": ["a", "b", "c"], "positive": ["d", "e", "f"], "negative": ["g", "h", "i"]} | columns)


@pytest.mark.parametrize(
    "negative",
    [
        ["g", "h", "i"],
        [["g", "x"], ["h"], ["i"]],
        pa.array(["g", "h", "i"], pa.large_string()),
        pa.array(["g", "h", "i"]).dictionary_encode(),
    ],
    ids=["text", "list", "large", "dictionary"],
)
def test_parquet_rows(tmp_path, negative):
    pq.write_table(table(negative=negative, source=["s", None, "t"]), tmp_path / "data.parquet", row_group_size=2)
    records = read(TripletReader(), tmp_path / "data.parquet")
    assert records == [
        Triplet("data.parquet:1", "a", "d", ("g",), "s"),
        Triplet("data.parquet:2", "b", "e", ("h",), "data"),
        Triplet("data.parquet:3", "c", "f", ("i",), "t"),
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"query": ["a", "b", ""]}, "query is empty"),
        ({"query": ["a", "b", None]}, "query must be text, not null"),
        ({"positive": ["a", "b", "c\0"]}, "positive has a NUL character"),
        ({"negative": [["a"], ["b"], []]}, "negative has 0 texts"),
        ({"negative": [["a"], ["b"], ["", "c"]]}, "negative is empty"),
        (
            {"query": pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b", b"\xff"]).buffers())},
            "query is not UTF-8 (byte 1 is 0xff)",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path, columns, reason):
    pq.write_table(table(**columns), tmp_path / "data.parquet", row_group_size=2)
    first, second, bad = read(TripletReader(), tmp_path / "data.parquet")
    assert (first.id, second.id, bad.where) == ("data.parquet:1", "data.parquet:2", "data.parquet:3")
    assert bad.reason.startswith(reason)


def test_a_column_of_another_type_spoils_its_rows(tmp_path):
    pq.write_table(table(query=[1, 2, 3]), tmp_path / "data.parquet")
    assert [record.reason for record in read(TripletReader(), tmp_path / "data.parquet")] == ["query must be text, not a number"] * 3


def test_a_parquet_file_without_a_column_and_one_that_is_none_are_refused(tmp_path):
    pq.write_table(pa.table({"query": ["a"], "text": ["b"]}), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet has no column positive, negative; it has query, text"):
        read(TripletReader(), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is not a parquet file"):
        read(TripletReader(), write(tmp_path / "other.parquet", GOOD))


def test_a_senseless_number_of_negatives_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        TripletReader(-1)
