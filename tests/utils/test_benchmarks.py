from pathlib import Path

import pytest

from src.utils.benchmarks import named_tasks
from tests.own_files import write_own_tasks


def names(*wanted: str, data_dir: Path | None = None) -> list[str]:
    return [task.metadata.name for task in named_tasks(wanted, data_dir)]


def test_benchmarks_by_the_letters_and_digits_of_their_names() -> None:
    assert len(names("mteb_eng_v1")) == 56
    assert names("mteb_eng_v1") == names("MTEB(eng, v1)")
    assert len(names("mteb_eng_v2")) == 41
    assert names("mteb_eng_v2", "BIOSSES") == names("mteb_eng_v2")  # which has it


def test_tasks_by_name(tmp_path: Path) -> None:
    write_own_tasks(tmp_path / "data" / "mine")
    assert names("BIOSSES", "MySTS", "STS12", data_dir=tmp_path / "data") == ["BIOSSES", "MySTS", "STS12"]
    assert len(names("own", data_dir=tmp_path / "data")) == 6
    assert names(str(tmp_path / "data/mine/MySTS.yaml")) == ["MySTS"]


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MTEB has no task or benchmark named 'STSBench', and no task of your own is"):
        names("STSBench", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no task of your own in .*: a YAML file there"):
        names("own", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no description of a task at /nowhere/A.yaml"):
        names("/nowhere/A.yaml")
