"""Which folder a run takes, and that nobody else works in it."""

import os
import signal
import time
from pathlib import Path

import pytest

from src.utils.checkpoint_io import CheckpointError
from src.utils.run_folder import alone_in, choose_folder, starting_point


def begun(folder: Path, at: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    os.utime(folder / "run.lock", (at, at))
    return folder


def saved(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "batch_4.ckpt"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "last.ckpt").symlink_to(checkpoint.name)
    return checkpoint


def test_the_run_that_was_started_last_is_gone_on_with_and_another_name_is_another_run(tmp_path: Path) -> None:
    begun(tmp_path / "tiny" / "b", at=10)
    latest = begun(tmp_path / "tiny" / "a", at=20)  # an older run, gone on with since
    (tmp_path / "tiny" / "c").mkdir()  # where nothing was trained
    assert choose_folder(str(tmp_path), "tiny", "now", "last") == str(latest)
    assert choose_folder(str(tmp_path), "tiny", "now", None) == str(tmp_path / "tiny" / "now")
    assert choose_folder(str(tmp_path), "other", "now", "last") == str(tmp_path / "other" / "now")


def test_a_checkpoint_brings_the_folder_of_its_run_and_one_from_elsewhere_a_new_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "tiny" / "a", at=10)
    saved(run)
    for name in ("last.ckpt", "batch_4.ckpt"):
        assert choose_folder(str(tmp_path), "tiny", "now", f"{run}/checkpoints/{name}") == str(run)
    assert choose_folder(str(tmp_path), "tiny", "now", f"{tmp_path}/downloads/last.ckpt") == str(tmp_path / "tiny" / "now")


def test_a_job_that_slurm_requeued_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "grace")
    first = choose_folder(str(tmp_path), "tiny", "monday", None)
    assert first == str(tmp_path / "tiny" / "monday_slurm17")
    begun(Path(first), at=10)
    begun(tmp_path / "tiny" / "monday_slurm18", at=20)  # another job's
    assert choose_folder(str(tmp_path), "tiny", "tuesday", None) == str(tmp_path / "tiny" / "tuesday_slurm17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose_folder(str(tmp_path), "tiny", "tuesday", None) == first
    assert starting_point(None, Path(first)) is None  # killed before its first checkpoint
    assert starting_point(None, Path(first)) is None
    checkpoint = saved(Path(first))
    assert starting_point(None, Path(first)) == str(checkpoint)


def test_where_a_run_starts(tmp_path: Path) -> None:
    assert starting_point(None, tmp_path) is None
    assert starting_point("last", tmp_path) is None
    checkpoint = saved(tmp_path)
    assert starting_point("last", tmp_path) == str(checkpoint)
    assert starting_point(str(checkpoint.parent / "last.ckpt"), tmp_path) == str(checkpoint)  # the link moves on, this does not
    with pytest.raises(RuntimeError, match=r"holds a run already: go on with it by ckpt_path=last, or name another folder"):
        starting_point(None, tmp_path)
    checkpoint.rmdir()
    with pytest.raises(CheckpointError, match=r"last.ckpt leads to a checkpoint that is gone; there is no other whole checkpoint"):
        starting_point("last", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at /nowhere/last\.ckpt"):
        starting_point("/nowhere/last.ckpt", tmp_path)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone_even_if_it_was_killed(tmp_path: Path) -> None:
    holder = os.fork()
    if holder == 0:
        with alone_in(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=rf"is in use by process {holder} on .*: wait for it, or name another"), alone_in(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with alone_in(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()
