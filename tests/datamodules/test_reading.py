"""Every kind of malformed record, with the line or row that is reported."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.files import DataFile
from src.datamodules.preparation import scan
from src.datamodules.reading import SentenceReader, TripletReader
from src.datamodules.rows import BadRecord, Chunk
from src.records import Triplet
from tests.datamodules.builders import read, write

GOOD = {"query": "what is a fox", "positive": "a fox is an animal", "negative": ["a box is a thing", "a sock"], "source": "zoo"}


def test_good_lines(tmp_path):
    file = write(tmp_path / "data.jsonl", GOOD, b"", b"  \r", {**GOOD, "negative": "one text", "source": None, "more": 1})
    assert read(TripletReader(), file) == [
        Triplet("data.jsonl:1", GOOD["query"], GOOD["positive"], ("a box is a thing",), "zoo"),
        Triplet("data.jsonl:4", GOOD["query"], GOOD["positive"], ("one text",), "data"),
    ]
    (_, second) = read(TripletReader(negatives=0), write(file, GOOD, {"query": "q", "positive": "p"}))
    assert second.negatives == ()


def test_gz_reads_like_plain(tmp_path):
    lines = [GOOD, b"", {**GOOD, "query": "Gr\u00f6\u00dfe", "source": None}, b"\xff", b"x" * 9_000_000, GOOD]
    plain, packed = write(tmp_path / "data.jsonl", *lines), tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()[:700]) + gzip.compress(plain.read_bytes()[700:]))  # as `cat` joins two
    expected = [str(record).replace("data.jsonl:", "data.jsonl.gz:") for record in read(TripletReader(), plain)]
    assert [str(record) for record in read(TripletReader(), packed)] == expected
    (tmp_path / "data.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert [record.query for record in read(SentenceReader(), tmp_path / "data.txt.gz")] == ["one", "two"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[:40] + b"?" + b[41:], lambda b: b"plain" + b], ids=["cut", "byte", "text"]
)
def test_damaged_gz_is_named(tmp_path, damage):
    packed = gzip.compress("".join(f"text {i * 7919}\n" for i in range(1000)).encode())
    (tmp_path / "data.txt.gz").write_bytes(damage(packed))
    with pytest.raises(ValueError, match=r"^data\.txt\.gz .*damaged.*$"):
        read(SentenceReader(), tmp_path / "data.txt.gz")


def test_file_cut_while_read_ends(tmp_path):
    file = write(tmp_path / "data.jsonl", GOOD, GOOD)
    (chunk,) = scan(DataFile(file, file.name))[1]
    write(file, GOOD)
    assert len(list(TripletReader().read(chunk))) == 1


def test_bom_crlf_and_no_last_newline(tmp_path):
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
        ({**GOOD, "positive": [["a"]]}, "positive must be text, not a list"),
        ({**GOOD, "positive": []}, "positive has 0 texts"),
        ({**GOOD, "negative": {"text": "a"}}, "negative must be text, not an object"),
        ({**GOOD, "negative": [3]}, "negative must be text, not a number"),
        ({**GOOD, "negative": []}, "negative has 0 texts, datamodule.reader.negatives=1"),
        ({**GOOD, "query": ""}, "query is empty"),
        ({**GOOD, "positive": " \u3000"}, "positive is empty"),
        ({**GOOD, "negative": [""]}, "negative is empty"),
        ({**GOOD, "source": 3}, "source must be text, not a number"),
        (b"x" * 10_000_000, "a line of 10,000,001 bytes; the limit is 8,388,608"),
        ({**GOOD, "positive": "x" * 10_000_000}, "a line of 10,000,"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_malformed_line(tmp_path, line, reason):
    before, bad, after = read(TripletReader(), write(tmp_path / "data.jsonl", b"", GOOD, line, GOOD))
    assert (before.id, bad.where, after.id) == ("data.jsonl:2", "data.jsonl:3", "data.jsonl:4")
    assert bad.reason.startswith(reason)


def test_sentences(tmp_path):
    lines = (b"One sentence. ", b"", b"caf\xc3\xa9", b"caf\xe9", b"a\x00b", b"x" * 10_000_000, b"The last.")
    records = read(SentenceReader(), write(tmp_path / "wiki.txt", *lines))
    assert records[0] == Triplet("wiki.txt:1", "One sentence.", "One sentence.", (), "wiki")
    assert [r.query for r in records if isinstance(r, Triplet)] == ["One sentence.", "café", "The last."]
    bad = [r for r in records if isinstance(r, BadRecord)]
    assert [r.where for r in bad] == ["wiki.txt:4", "wiki.txt:5", "wiki.txt:6"]
    assert str(bad[0]) == "wiki.txt:4: not UTF-8 (byte 4 is 0xe9)"
    assert records[-1].id == "wiki.txt:7"


# ---- parquet


def table(**columns: object) -> pa.Table:
    return pa.table({"query": ["a", "b", "c"], "positive": ["d", "e", "f"], "negative": ["g", "h", "i"]} | columns)


NEGATIVES = {
    "text": ["g", "h", "i"],
    "list": [["g", "x"], ["h"], ["i"]],
    "large": pa.array(["g", "h", "i"], pa.large_string()),
    "dictionary": pa.array(["g", "h", "i"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_parquet_rows(tmp_path, kind):
    pq.write_table(table(negative=NEGATIVES[kind], source=["s", None, "t"]), tmp_path / "data.parquet", row_group_size=2)
    assert read(TripletReader(), tmp_path / "data.parquet") == [
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
        ({"negative": [["g"], ["h"], []]}, "negative has 0 texts"),
        ({"negative": [["g"], ["h"], ["", "i"]]}, "negative is empty"),
        (
            {"query": pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b", b"\xff"]).buffers())},
            "query is not UTF-8 (byte 1 is 0xff)",
        ),
    ],
)
def test_malformed_row(tmp_path, columns, reason):
    pq.write_table(table(**columns), tmp_path / "data.parquet", row_group_size=2)
    first, second, bad = read(TripletReader(), tmp_path / "data.parquet")
    assert (first.id, second.id, bad.where) == ("data.parquet:1", "data.parquet:2", "data.parquet:3")
    assert bad.reason.startswith(reason)


def test_unusable_parquet_files(tmp_path):
    pq.write_table(table(query=[1, 2, 3]), tmp_path / "data.parquet")
    assert [record.reason for record in read(TripletReader(), tmp_path / "data.parquet")] == ["query must be text, not a number"] * 3
    pq.write_table(pa.table({"query": ["a"], "text": ["b"]}), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet has no column positive, negative; it has query, text"):
        read(TripletReader(), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is not a parquet file"):
        read(TripletReader(), write(tmp_path / "other.parquet", GOOD))


def test_negatives_below_zero():
    with pytest.raises(ValueError, match="negatives=-1"):
        TripletReader(-1)


def test_bom_is_removed_wherever_files_were_joined(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "data.txt").write_bytes(bom + b"one\n" + bom + b"two\nthree" + bom + b"four\n")
    assert [record.query for record in read(SentenceReader(), tmp_path / "data.txt")] == ["one", "two", "threefour"]


@pytest.mark.parametrize(
    ("negative", "expected", "left_out"),
    [
        (["a fox is an animal"], None, 0),
        (["what is a fox "], None, 0),
        ([" a fox is an animal ", "a sock"], ("a sock",), 1),
        (["what is a fox", "a fox is an animal", "a sock", "what is a fox"], ("a sock",), 2),  # the last would not be used anyway
    ],
)
def test_a_negative_that_equals_the_query_or_the_positive_is_no_negative(tmp_path, negative, expected, left_out):
    path, tally = write(tmp_path / "data.jsonl", {**GOOD, "negative": negative}), Counter()
    (record,) = TripletReader().read(Chunk(DataFile(path, path.name)), tally)
    if expected is None:
        assert isinstance(record, BadRecord)
        assert "negative equals the query or the positive" in record.reason
    else:
        assert record.negatives == expected
    assert tally["equal_negatives"] == left_out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"text": "a sentence", "id": 1}, "a sentence"),
        (b"{curly} sentence {}", "{curly} sentence {}"),
        ({"title": "t"}, "without the field 'text'"),
        (b'{"text": "a senten', "not JSON (Unterminated string"),
        (b'{"text": "a"}, "b"', "not JSON (Extra data"),
        (b'{ "text": "cut sente', "not JSON (Unterminated string"),
        (b'  { "text": "a sentence"}', "a sentence"),
        (b'[{"text": "a"}]', "a line is text or a JSON object, not a list"),
        (b'[ {"text": "a"}, {"text": "cut', "not JSON (Unterminated string"),
        (b'["a", "b"]', "a line is text or a JSON object, not a list"),
        (b'["Hello"] he said.', '["Hello"] he said.'),
        (b'["Hello," he said, "you"]', '["Hello," he said, "you"]'),
        (b"[1] See the appendix.", "[1] See the appendix."),
        (b"[12]", "[12]"),
        (b"[{x}] is a set of sets", "[{x}] is a set of sets"),
        (b"{x} is a set", "{x} is a set"),
        (b"{ x | x > 0 }", "{ x | x > 0 }"),
    ],
)
def test_sentences_of_json_lines(tmp_path, line, expected):
    (record,) = read(SentenceReader(), write(tmp_path / "data.txt", line))
    assert expected in (record.reason if isinstance(record, BadRecord) else [record.query])
    (record,) = read(SentenceReader({"text": "title"}), write(tmp_path / "data.txt", {"title": "t"}))
    assert record.positive == "t"


@pytest.mark.parametrize(
    ("record", "advised"), [(GOOD, True), ({"anchor": "a", "positive": "p"}, True), ({"query": "q", "id": "1"}, False)]
)
def test_triplets_read_as_sentences_name_their_datamodule(tmp_path, record, advised):
    (bad,) = read(SentenceReader(), write(tmp_path / "data.jsonl", record))
    assert "datamodule.columns.text=<name>" in bad.reason
    assert ("or datamodule=triplets" in bad.reason) == advised
    rows = [",".join(record).encode(), b",".join([b"x"] * len(record))]
    with pytest.raises(ValueError, match=r"datamodule\.columns\.text=<name>") as caught:
        read(SentenceReader(), write(tmp_path / "data.csv", *rows))
    assert ("or datamodule=triplets" in str(caught.value)) == advised


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json", "data.jsonl.gz"])
def test_sentences_of_json_files_are_json(tmp_path, name):
    lines = [{"text": "an object"}, "a string", b"plain text", 3, ["a list"], None, " ", b'{"text": "cut', {"sentence": "last"}]
    path = write(tmp_path / name, *lines)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    records = read(SentenceReader(), path)
    assert [r.query for r in records if isinstance(r, Triplet)] == ["an object", "a string", "last"]
    reasons = {r.where: r.reason for r in records if isinstance(r, BadRecord)}
    assert list(reasons) == [f"{name}:{line}" for line in range(3, 9)]
    assert reasons[f"{name}:3"].startswith("not JSON (")
    assert reasons[f"{name}:4"] == "a line is a JSON object or a JSON string, not a number"
    assert reasons[f"{name}:7"] == "text is empty"


@pytest.mark.parametrize("reader", [SentenceReader(), TripletReader()], ids=repr)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_refused(tmp_path, reader, indent):
    path = write(tmp_path / "data.json", json.dumps([GOOD, GOOD], indent=indent).encode())
    with pytest.raises(ValueError, match=r"^data\.json is one JSON array: write JSON lines, one record a line$"):
        read(reader, path)


def test_escaped_bom_is_removed(tmp_path):
    path = write(tmp_path / "data.jsonl", {"text": "\ufeffHello"}, {"text": "\ufeff"})
    assert b"\\ufeffHello" in path.read_bytes()
    hello, empty = read(SentenceReader(), path)
    assert (hello.query, str(empty)) == ("Hello", "data.jsonl:2: text is empty")


@pytest.mark.parametrize("reader", [SentenceReader({"text": "query"}), TripletReader()], ids=repr)
@pytest.mark.parametrize("name", ["none.csv", "none.tsv", "header.csv", "none.parquet", "bare.parquet"])
def test_table_without_rows(tmp_path, reader, name):
    path = write(tmp_path / name, *([b"query,positive,negative"] if name == "header.csv" else []))
    if name.endswith(".parquet"):
        pq.write_table(table().slice(0, 0) if name == "none.parquet" else pa.table({}), path)
    assert reader.describe(DataFile(path, name)) == ""
    assert read(reader, path) == []
