from pathlib import Path

import pytest

from src.evaluation.benchmarks import named_tasks
from tests.own_files import write_own_tasks


def names(*wanted: str, data_dir: Path | None = None) -> list[str]:
    return [task.metadata.name for task in named_tasks(wanted, data_dir)]


def test_benchmarks_by_name():
    assert len(names("mteb_eng_v1")) == 56
    assert names("mteb_eng_v1") == names("MTEB(eng, v1)")
    assert [len(names(name)) for name in ("mteb_eng_v2", "nanobeir", "bright")] == [41, 13, 1]  # as docs/evaluation.md has them
    assert len(names("mteb_eng_v2")) == 41
    assert names("mteb_eng_v2", "BIOSSES") == names("mteb_eng_v2")  # which has it


def test_tasks_by_name(tmp_path):
    write_own_tasks(tmp_path / "data" / "mine")
    assert names("BIOSSES", "MySTS", "STS12", data_dir=tmp_path / "data") == ["BIOSSES", "MySTS", "STS12"]
    assert len(names("own", data_dir=tmp_path / "data")) == 6
    assert names(str(tmp_path / "data/mine/MySTS.yaml")) == ["MySTS"]


@pytest.mark.parametrize(
    ("name", "subsets", "splits"),
    [
        ("STS17", ["en-en"], ["test"]),  # as in both English benchmarks
        ("AmazonCounterfactualClassification", ["en"], ["test"]),
        ("MSMARCO", ["default"], ["dev"]),  # of the first
        ("STS22.v2", ["en"], ["test"]),  # of the second
        ("JSTS", ["default"], ["validation"]),  # of none: there is no English in it
    ],
)
def test_named_task_is_english_only(name, subsets, splits):
    (task,) = named_tasks([name])
    assert (task.hf_subsets, task.eval_splits) == (subsets, splits)


def test_first_of_two_equal_names(tmp_path):
    files = [str(write_own_tasks(tmp_path / folder) / "MySTS.yaml") for folder in ("first", "second")]
    (task,) = named_tasks(files)
    assert task.metadata.dataset["path"] == str(tmp_path / "first")


def test_broken_description_stops_only_its_users(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    assert names(data_dir=tmp_path) == []  # as benchmark=test asks for it
    assert len(names("mteb_eng_v2", data_dir=tmp_path)) == 41
    assert names(str(write_own_tasks(tmp_path / "data" / "mine") / "MySTS.yaml"), data_dir=tmp_path) == ["MySTS"]
    for name in ("own", "MySTS", "BIOSSES"):
        with pytest.raises(ValueError, match=r"broken.yaml is not YAML"):
            names(name, data_dir=tmp_path)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"MTEB has no task or benchmark named 'STSBench', and no task of your own is"):
        names("STSBench", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no task of your own in .*: a YAML file there"):
        names("own", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no description of a task at /nowhere/A.yaml"):
        names("/nowhere/A.yaml")
