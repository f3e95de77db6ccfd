"""Names of columns, by setting or as other projects have them, in every format."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.columns import given_columns, in_words, roles_of
from src.datamodules.files import DataFile
from src.datamodules.reading import SentenceReader, TripletReader
from src.datamodules.rows import BadRecord
from src.records import Triplet
from tests.datamodules.builders import read, write

ROLES = ("query", "positive", "negative", "source")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["query", "positive", "negative", "source"], "query=query, positive=positive, negative=negative, source=source"),
        (["anchor", "positive", "negative"], "query=anchor, positive=positive, negative=negative (names of sentence-transformers)"),
        (
            ["anchor", "positive", "negative_10", "negative_2", "negative_1"],
            "query=anchor, positive=positive, negative=['negative_1', 'negative_2', 'negative_10'] (names of sentence-transformers)",
        ),
        (["query", "pos", "neg", "pos_scores", "prompt"], "query=query, positive=pos, negative=neg (names of FlagEmbedding)"),
        (["sent0", "sent1", "hard_neg"], "query=sent0, positive=sent1, negative=hard_neg (names of SimCSE)"),
    ],
)
def test_names_of_other_projects(names, words):
    assert in_words(roles_of(tuple(names), (), ROLES)) == words


def test_given_names_come_first():
    given = given_columns({"query": "question", "negative": ["bad 1", "bad 2"], "positive": None}, ROLES)
    found = roles_of(("query", "question", "positive", "bad 1", "bad 2"), given, ROLES)
    assert found == {"query": ("question",), "positive": ("positive",), "negative": ("bad 1", "bad 2")}
    assert "query" not in roles_of(("query", "positive"), given, ROLES)  # never another column than the one that is named


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"anchor": "a"}, r"datamodule\.columns\.anchor: .*query, positive"),
        ({"query": ["a", "b"]}, r"columns\.query=\['a', 'b'\]"),
        ({"query": 0}, r"^datamodule\.columns\.query=0: it is the name of a column"),
        ({"query": {"a": "b"}}, r"^datamodule\.columns\.query=\{'a': 'b'\}: it is the name of a column"),
        ({"negative": ["a", 1]}, r"^datamodule\.columns\.negative=\['a', 1\]: it is the name of a column"),
    ],
)
def test_impossible_names(columns, message):
    with pytest.raises(ValueError, match=message):
        TripletReader(columns=columns)


ROWS = [
    {"anchor": 'a "quoted", text', "pos": "over\ntwo lines", "neg1": "n", "neg2": "m"},
    {"anchor": "b", "pos": "plain", "neg1": "plain", "neg2": "other"},
]
COLUMNS = {"query": "anchor", "positive": "pos", "negative": ["neg1", "neg2"]}
EXPECTED = [('a "quoted", text', "over\ntwo lines", ("n",)), ("b", "plain", ("other",))]


def write_csv(path):
    lines = ["anchor,pos,neg1,neg2", '"a ""quoted"", text","over', 'two lines",n,m', "b,plain,plain,other"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as Excel saves it


def write_gz(path):
    write_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


WRITERS = {
    "data.jsonl": lambda path: write(path, *ROWS),
    "data.csv": write_csv,
    "data.csv.gz": write_gz,
    "data.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_hold_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    reader = TripletReader(columns=COLUMNS)
    found = read(reader, tmp_path / name)
    assert [(t.query, t.positive.replace("\r", ""), t.negatives) for t in found] == EXPECTED
    assert [t.source for t in found] == ["data", "data"]
    lines = [2, 4] if "csv" in name else [1, 2]  # of a CSV file the line where the row begins
    assert [t.id for t in found] == [f"{name}:{line}" for line in lines]
    assert (
        reader.describe(DataFile(tmp_path / name, name))
        == "query=anchor, positive=pos, negative=['neg1', 'neg2'] (names of sentence-transformers)"
    )


def test_tsv_has_no_quotes(tmp_path):
    file = write(tmp_path / "data.tsv", b"sent0\tsent1\thard_neg", b'a "b\tc"\td', b"too\tfew", b"e\tf\tg")
    first, bad, last = read(TripletReader(), file)
    assert (first.query, first.positive, last.id) == ('a "b', 'c"', "data.tsv:4")
    assert str(bad) == "data.tsv:3: 2 fields between tabs, and the columns are sent0, sent1, hard_neg"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,b", "2 fields between commas, and the columns are query, positive, negative"),
        (b'a,"b"c,d', "not CSV ("),
        (b"a,\xff,c", "not UTF-8 (byte 3 is 0xff)"),
        (b"a,b\x00,c", "a NUL (byte 4 of the line)"),
        (b"a,b,%s" % (b"x" * 9_000_000), "a line of 9,000,005 bytes"),
        (b"a,,c", "positive is empty"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_csv_row(tmp_path, line, reason):
    file = write(tmp_path / "data.csv", b"query,positive,negative", b"a,b,c", line, b"", b"d,e,f")
    first, bad, last = read(TripletReader(), file)
    assert (first.id, bad.where, last.id) == ("data.csv:2", "data.csv:3", "data.csv:5")
    assert bad.reason.startswith(reason)


def test_csv_that_ends_within_quotes(tmp_path):
    first, bad = read(TripletReader(), write(tmp_path / "data.csv", b"query,positive,negative", b"a,b,c", b'"a,b,c', b"d,e,f"))
    assert first.query == "a"
    assert str(bad).startswith("data.csv:3: not CSV (unexpected end of data)")


def test_flag_embedding_lists(tmp_path):
    row = {"query": "q", "pos": ["first", "second"], "neg": ["first", "n1", "n2"]}
    (record,) = read(TripletReader(2), write(tmp_path / "data.jsonl", row))
    assert record == Triplet("data.jsonl:1", "q", "first", ("n1", "n2"), "data")


@pytest.mark.parametrize("columns", [{}, {"query": "question"}], ids=str)
def test_unknown_columns_are_named(tmp_path, columns):
    (bad,) = read(TripletReader(columns=columns), write(tmp_path / "data.jsonl", {"premise": "a", "positive": "b", "negative": "c"}))
    expected = "query (question)" if columns else "query"
    assert bad.reason == f"no field {expected}; it has premise, positive, negative (datamodule.columns)"
    with pytest.raises(ValueError, match=r"data\.csv has no column query.*; it has premise, positive: .*datamodule\.columns\.query=<name>"):
        read(TripletReader(0, columns), write(tmp_path / "data.csv", b"premise,positive"))


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.parquet"])
def test_sentences_of_tables(tmp_path, name):
    rows = [{"id": str(i), "body": f"text {i}"} for i in range(3)]
    path, between = tmp_path / name, {"data.csv": ",", "data.tsv": "\t"}.get(name, "")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(
            path, *(rows if not between else [between.join(row).encode() for row in ({k: k for k in rows[0]}, *(r.values() for r in rows))])
        )
    assert [t.query for t in read(SentenceReader({"text": "body"}), path)] == ["text 0", "text 1", "text 2"]
    if name == "data.jsonl":
        assert all("without the field 'text'; it has id, body" in str(bad) for bad in read(SentenceReader(), path))
    else:
        with pytest.raises(ValueError, match=rf"{name} has no column 'text'; it has id, body: datamodule\.columns\.text=<name>"):
            read(SentenceReader(), path)


def test_only_column_of_a_table_is_its_text(tmp_path):
    path = write(tmp_path / "data.csv", b"whatever", b"one", b'"two, three"')
    assert [t.query for t in read(SentenceReader(), path)] == ["one", "two, three"]
    assert SentenceReader().describe(DataFile(path, path.name)) == "text=whatever"
    assert isinstance(read(SentenceReader(), write(tmp_path / "data.txt", json.dumps({"whatever": "x"}).encode()))[0], BadRecord)


@pytest.mark.parametrize(("name", "header"), [("data.csv", b"query,positive,negative,query"), ("data.tsv", b"query\tpositive\tquery")])
def test_repeated_column_is_refused(tmp_path, name, header):
    path = write(tmp_path / name, header)
    with pytest.raises(ValueError, match=rf"^{name} has more than one column 'query': rename"):
        read(TripletReader(0), path)
    unnamed = write(tmp_path / "unnamed.csv", b"query,positive,,", b"a,b,,")  # as spreadsheets save empty columns
    assert [t.query for t in read(TripletReader(0), unnamed)] == ["a"]
