"""Data that would like to run code, to lie elsewhere, or to be no data at all."""

import codecs
import contextlib
import json
import os
import pickle
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from src.datamodules import preparation
from src.datamodules.files import DataFile, find_files, inside
from src.datamodules.preparation import load_report, prepare, scan
from src.datamodules.prepared import PreparedTriplets
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import BadRecord, Reader, SentenceReader, TripletReader
from src.evaluation.benchmarks import named_tasks
from src.evaluation.tasks.mteb_mirror import copy_folder
from src.evaluation.tasks.own_tasks import read_description
from src.records import Triplet
from tests.builders import small_tokenizer
from tests.fuzzing import HUNDRED_OR_THOUSANDS
from tests.modules.policy.test_pretrained import Touch

EVIL_YAML = "!!python/object/apply:os.mkdir [{}]"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once hostile code has run."""
    return tmp_path / "ran"


# ---- names


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "a/../../secret.jsonl", "link.jsonl", "folder/secret.jsonl"])
def test_names_that_lead_out_of_the_data_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jsonl").write_text("{}")
    root = tmp_path / "data"
    root.mkdir()
    (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "folder").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"leads out of .*: data is read from its own folder alone"):
        inside(root, name)


def test_names_inside_are_taken_with_links_among_them_and_those_of_the_hubs_cache(tmp_path: Path) -> None:
    root = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    (root / "sub").mkdir(parents=True)
    blob = tmp_path / "datasets--a--b" / "blobs" / "123"
    blob.parent.mkdir()
    blob.write_text("{}")
    (root / "one.jsonl").symlink_to(os.path.relpath(blob, root))
    (root / "sub" / "two.jsonl").write_text("{}")
    (root / "three.jsonl").symlink_to("sub/two.jsonl")
    assert [file.name for file in find_files(str(root), ["*.jsonl"])] == ["one.jsonl", "sub/two.jsonl", "three.jsonl"]
    assert inside(root, "sub/../sub/two.jsonl").read_text() == "{}"


def test_a_folder_with_a_link_to_elsewhere_is_refused_by_the_name_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a secret line")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=r"'notes\.txt' leads out of"):
        find_files(str(tmp_path / "data"), ["*.txt"])
    assert [file.name for file in find_files(str(tmp_path / "key"), ["*.txt"])] == ["key"]  # named itself, it is what is asked for


def test_a_mirror_gives_no_folder_outside_of_it(tmp_path: Path) -> None:
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


def test_a_data_sets_own_script_is_not_run(tmp_path: Path, ran: Path) -> None:
    folder = copied(tmp_path)
    (folder / f"{folder.name}.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    (task,) = named_tasks(["Banking77Classification"], tmp_path)
    assert task.metadata.dataset["path"] == str(folder)
    with pytest.raises(Exception, match=r"scripts are no longer supported|no data|Couldn't find|No \(supported\) data"):
        task.load_data()
    assert not ran.exists()


def test_the_header_of_a_data_card_is_no_code(tmp_path: Path, ran: Path) -> None:
    folder = copied(tmp_path)
    (folder / "test.jsonl").write_text(json.dumps({"text": "a", "label": 1}) + "\n")
    (folder / "README.md").write_text(f"---\nconfigs: {EVIL_YAML.format(ran)}\n---\n")
    (task,) = named_tasks(["Banking77Classification"], tmp_path)
    with pytest.raises(Exception, match=r"could not determine a constructor|python/object"):
        task.load_data()
    assert not ran.exists()


def test_yaml_is_read_without_objects(tmp_path: Path, ran: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"a: {EVIL_YAML.format(ran)}\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        OmegaConf.load(file)
    with pytest.raises(ValueError, match=r"evil\.yaml is not YAML"):
        read_description(file)
    assert not ran.exists()
    yaml.unsafe_load(file.read_text())
    assert ran.exists()  # it would have worked


def test_pickles_in_the_metadata_of_parquet_and_prepared_files_are_bytes(tmp_path: Path, ran: Path) -> None:
    evil = pickle.dumps(Touch(ran))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    names = ["query", "positive", "negative"]
    schema = pa.schema([pa.field(name, pa.string(), metadata=extension) for name in names], metadata={b"pandas": evil})
    table = pa.table([["a"], ["b"], ["c"]], schema=schema)
    pq.write_table(table, tmp_path / "data.parquet")
    file = DataFile(tmp_path / "data.parquet", "data.parquet")
    folder = prepare([file], TripletReader(), PromptLimit(small_tokenizer(), "Name.", 100), tmp_path / "cache")
    assert PreparedTriplets(folder).triplets(np.array([0])) == [Triplet("data.parquet:1", "a", "b", ("c",), "data")]
    assert not ran.exists()


@pytest.mark.parametrize("value", [{"_target_": "os.system", "_args_": ["touch ran"]}, "${oc.env:HOME}", "!!python/object:os.system"])
def test_what_means_something_to_configs_means_nothing_in_records(tmp_path: Path, value: object) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"query": value, "positive": str(value), "negative": "n"}) + "\n")
    (record,) = read(TripletReader(), tmp_path / "data.jsonl")
    if isinstance(value, dict):
        assert isinstance(record, BadRecord)
    else:
        assert isinstance(record, Triplet)
        assert record.query == value


# ---- anything


def read(reader: Reader, path: Path) -> list[Triplet | BadRecord]:
    return [record for chunk in scan(DataFile(path, path.name))[1] for record in reader.read(chunk)]


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
def test_any_lines_are_records_or_named_as_bad_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Reader, cases: settings
) -> None:
    file = tmp_path / "data.jsonl"

    @cases
    @given(st.lists(st.tuples(line, ends), max_size=8), st.integers(1, 60))
    def check(lines: list[tuple[bytes, bytes]], block: int) -> None:
        file.write_bytes(b"".join(raw + end for raw, end in lines))
        whole = read(reader, file)
        monkeypatch.setattr(preparation, "_CHUNK_BYTES", block)
        assert read(reader, file) == whole  # however it is cut
        monkeypatch.undo()
        numbers = []
        for record in whole:
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


class NamedError(Exception):
    """One line that begins with the file's name."""


def read_or_named_error(file: Path) -> list[Triplet | BadRecord]:
    try:
        return read(TripletReader(), file)
    except ValueError as error:
        if str(error).startswith(f"{file.name} ") and "\n" not in str(error):
            raise NamedError from error
        raise


@pytest.mark.parametrize("cases", HUNDRED_OR_THOUSANDS)
def test_a_damaged_parquet_file_is_one_error_or_its_records(tmp_path: Path, cases: settings) -> None:
    good = tmp_path / "good.parquet"
    columns = {"query": ["a", "b"] * 20, "positive": ["c", "d"] * 20, "negative": [["e"], ["f", "g"]] * 20}
    pq.write_table(pa.table(columns), good, row_group_size=16)
    whole, file = good.read_bytes(), tmp_path / "data.parquet"

    @cases
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4), st.none() | st.integers(0, len(whole)))
    def check(changes: list[tuple[int, int]], cut: int | None) -> None:
        damaged = bytearray(whole)
        for place, byte in changes:
            damaged[place] = byte
        file.write_bytes(bytes(damaged[:cut]))
        with contextlib.suppress(NamedError):
            found = read_or_named_error(file)
            assert all(isinstance(record, Triplet | BadRecord) for record in found)

    check()


@pytest.mark.parametrize("cases", HUNDRED_OR_THOUSANDS)
def test_what_is_prepared_is_what_was_read(tmp_path: Path, cases: settings) -> None:
    limit = PromptLimit(small_tokenizer(), "Name.", 60)
    file = DataFile(tmp_path / "data.txt", "data.txt")

    @settings(cases, max_examples=cases.max_examples // 5)  # each writes a folder
    @given(st.lists(st.text(max_size=30) | st.sampled_from(["<|im_end|>", "</think> a", "x" * 200]), max_size=6))
    def check(texts: list[str]) -> None:
        file.path.write_text("\n".join(texts), encoding="utf-8", newline="")
        triplets = [record for record in read(SentenceReader(), file.path) if isinstance(record, Triplet)]
        folder = prepare([file], SentenceReader(), limit, tmp_path / "cache", num_proc=1)
        report = load_report(folder)
        assert report.kept + report.too_long == len(triplets)
        kept = limit.within(triplets)
        assert report.kept == len(kept)
        if kept:
            prepared = PreparedTriplets(folder)
            assert prepared.triplets(np.arange(len(prepared))) == kept

    check()
