"""Data that tries to run code or to escape its folder, and data of arbitrary bytes."""

import codecs
import json
import pickle
from pathlib import Path

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from src.datamodules import preparation
from src.datamodules.files import DataFile
from src.datamodules.preparation import load_report, prepare
from src.datamodules.reading import SentenceReader, TripletReader
from src.datamodules.rows import BadRecord
from src.evaluation.benchmarks import named_tasks
from src.evaluation.tasks.mteb_mirror import copy_folder
from src.evaluation.tasks.own_tasks import read_description
from src.records import Triplet
from tests.datamodules.builders import all_triplets, limit, read, write
from tests.fuzzing import HUNDRED_OR_THOUSANDS
from tests.modules.policy.test_loading import Touch

EVIL_YAML = "!!python/object/apply:os.mkdir [{}]"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once hostile code has run."""
    return tmp_path / "ran"


def test_mirror_stays_in_its_folder(tmp_path):
    (tmp_path / "elsewhere" / "banking77").mkdir(parents=True)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "mteb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"'mteb/banking77/.*' leads out of"):
        named_tasks(["Banking77Classification"], tmp_path / "mirror")


# ---- code


def copied(root: Path) -> Path:
    """An empty folder where the copy of a data set would lie."""
    dataset = mteb.get_task("Banking77Classification").metadata.dataset
    folder = copy_folder(root, dataset["path"], dataset["revision"])
    folder.mkdir(parents=True)
    return folder


def test_data_set_script_is_not_run(tmp_path, ran):
    folder = copied(tmp_path)
    (folder / f"{folder.name}.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    (task,) = named_tasks(["Banking77Classification"], tmp_path)
    assert task.metadata.dataset["path"] == str(folder)
    with pytest.raises(Exception, match=r"scripts are no longer supported|no data|Couldn't find|No \(supported\) data"):
        task.load_data()
    assert not ran.exists()


def test_data_card_is_no_code(tmp_path, ran):
    folder = copied(tmp_path)
    (folder / "test.jsonl").write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    (folder / "README.md").write_text(f"---\nconfigs: {EVIL_YAML.format(ran)}\n---\n")
    (task,) = named_tasks(["Banking77Classification"], tmp_path)
    with pytest.raises(Exception, match=r"could not determine a constructor|python/object"):
        task.load_data()
    assert not ran.exists()


def test_yaml_makes_no_objects(tmp_path, ran):
    file = tmp_path / "evil.yaml"
    file.write_text(f"a: {EVIL_YAML.format(ran)}\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        OmegaConf.load(file)
    with pytest.raises(ValueError, match=r"evil\.yaml is not YAML"):
        read_description(file)
    assert not ran.exists()
    yaml.unsafe_load(file.read_text())
    assert ran.exists()  # it would have worked


def test_pickles_in_metadata_stay_bytes(tmp_path, ran):
    evil = pickle.dumps(Touch(ran))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    names = ["query", "positive", "negative"]
    schema = pa.schema([pa.field(name, pa.string(), metadata=extension) for name in names], metadata={b"pandas": evil})
    table = pa.table([["a"], ["b"], ["c"]], schema=schema)
    pq.write_table(table, tmp_path / "data.parquet")
    file = DataFile(tmp_path / "data.parquet", "data.parquet")
    assert all_triplets(prepare([file], TripletReader(), limit(100), tmp_path / "cache")) == [
        Triplet("data.parquet:1", "a", "b", ("c",), "data")
    ]
    assert not ran.exists()


@pytest.mark.parametrize("value", [{"_target_": "os.system", "_args_": ["touch ran"]}, "${oc.env:HOME}", "!!python/object:os.system"])
def test_config_syntax_in_records_is_text(tmp_path, value):
    (record,) = read(TripletReader(), write(tmp_path / "data.jsonl", {"query": value, "positive": str(value), "negative": "n"}))
    assert isinstance(record, BadRecord) if isinstance(value, dict) else record.query == value


# ---- anything


odd = st.sampled_from(["a text", "\x00", "\ud800", " ", ""])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | odd
dictionaries = st.dictionaries(st.text(max_size=3), scalars, max_size=3)
values = scalars | st.lists(scalars | dictionaries, max_size=3) | dictionaries
records = st.fixed_dictionaries({}, optional=dict.fromkeys(("query", "positive", "negative", "source", "other"), values))
line = st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")) | (records | values).map(lambda value: json.dumps(value).encode())
ends = st.sampled_from([b"\n", b"\r\n", b"\n\n"])


def is_blank(raw: bytes) -> bool:
    try:
        return not raw.decode().strip()
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("cases", HUNDRED_OR_THOUSANDS)
@pytest.mark.parametrize("reader", [TripletReader(), TripletReader(0), TripletReader(2), SentenceReader()], ids=repr)
def test_any_lines(tmp_path, monkeypatch, reader, cases):
    file = tmp_path / "data.jsonl"

    @cases
    @given(st.lists(st.tuples(line, ends), max_size=8), st.integers(1, 60))
    def check(lines, block):
        file.write_bytes(b"".join(raw + end for raw, end in lines))
        intact = read(reader, file)
        monkeypatch.setattr(preparation, "_CHUNK_BYTES", block)
        assert read(reader, file) == intact  # wherever it is cut
        monkeypatch.undo()
        numbers = []
        for record in intact:
            name, _, number = (record.id if isinstance(record, Triplet) else record.where).rpartition(":")
            assert name == "data.jsonl"
            numbers.append(int(number))
            if isinstance(record, Triplet):
                assert all(text.strip() and "\0" not in text and text.encode() for text in record.texts)
                assert len(record.negatives) == getattr(reader, "negatives", 0)
            else:
                assert record.reason
                assert "\n" not in str(record)
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        assert numbers == [number for number, raw in enumerate(content.split(b"\n"), start=1) if not is_blank(raw)]

    check()


@pytest.mark.parametrize("cases", HUNDRED_OR_THOUSANDS)
def test_damaged_parquet(tmp_path, cases):
    good = tmp_path / "good.parquet"
    columns = {"query": ["a", "b"] * 20, "positive": ["c", "d"] * 20, "negative": [["e"], ["f", "g"]] * 20}
    pq.write_table(pa.table(columns), good, row_group_size=16)
    intact, file = good.read_bytes(), tmp_path / "data.parquet"

    @cases
    @given(st.lists(st.tuples(st.integers(0, len(intact) - 1), st.integers(0, 255)), max_size=4), st.none() | st.integers(0, len(intact)))
    def check(changes, cut):
        damaged = bytearray(intact)
        for place, byte in changes:
            damaged[place] = byte
        file.write_bytes(bytes(damaged[:cut]))
        found = []
        message = "data.parquet "
        try:
            found = read(TripletReader(), file)
        except ValueError as error:
            message = str(error)
        assert all(isinstance(record, Triplet | BadRecord) for record in found)
        assert message.startswith("data.parquet ")
        assert "\n" not in message

    check()


@pytest.mark.parametrize("cases", HUNDRED_OR_THOUSANDS)
def test_prepared_is_what_was_read(tmp_path, cases):
    most = limit(60)
    file = DataFile(tmp_path / "data.txt", "data.txt")

    @settings(cases, max_examples=cases.max_examples // 5)  # each writes a folder
    @given(st.lists(st.text(max_size=30) | st.sampled_from(["<|im_end|>", "</think> a", "x" * 200]), max_size=6))
    def check(texts):
        file.path.write_text("\n".join(texts), encoding="utf-8", newline="")
        triplets = [record for record in read(SentenceReader(), file.path) if isinstance(record, Triplet)]
        folder = prepare([file], SentenceReader(), most, tmp_path / "cache", num_proc=1)
        report, kept = load_report(folder), most.within(triplets)
        assert (report.kept, report.too_long) == (len(kept), len(triplets) - len(kept))
        assert not kept or all_triplets(folder) == kept

    check()
