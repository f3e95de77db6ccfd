"""Which folder a run takes, and that nobody else works in it."""

import os
import signal
import time
from pathlib import Path

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from src.utils.checkpoint_io import CheckpointError
from src.utils.run_folder import OwnFolder, alone_in, choose_folder, starting_point
from src.utils.run_settings import write_settings


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
    with pytest.raises(FileNotFoundError, match=rf"^ckpt_path=last: no run with seed=0 was begun in {tmp_path}/other$"):
        choose_folder(str(tmp_path), "other", "now", "last", seed=0)


def test_last_is_a_run_of_the_same_seed(tmp_path: Path) -> None:
    for seed, at in ((0, 10), (1, 20)):
        write_settings(begun(tmp_path / "tiny" / f"s{seed}", at), {"seed": seed})
    assert choose_folder(str(tmp_path), "tiny", "now", "last", seed=0) == str(tmp_path / "tiny" / "s0")
    with pytest.raises(
        FileNotFoundError, match=rf"no run with seed=2 .*; of another seed there is ckpt_path={tmp_path}/tiny/s1/checkpoints/"
    ):
        choose_folder(str(tmp_path), "tiny", "now", "last", seed=2)


def test_a_checkpoint_brings_the_folder_of_its_run_and_one_from_elsewhere_a_new_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "tiny" / "a", at=10)
    saved(run)
    for name in ("last.ckpt", "batch_4.ckpt"):
        assert choose_folder(str(tmp_path), "tiny", "now", f"{run}/checkpoints/{name}") == str(run)
    assert choose_folder(str(tmp_path), "tiny", "now", f"{tmp_path}/downloads/last.ckpt") == str(tmp_path / "tiny" / "now")


@pytest.fixture
def in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "grace")


def work(folder: Path, overrides: list[str]) -> Path:
    """What a process leaves that begins in a folder."""
    with alone_in(folder, overrides):
        return folder


@pytest.mark.usefixtures("in_slurm")
def test_a_job_that_slurm_requeued_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose_folder(str(tmp_path), "tiny", "monday", None)
    assert first == str(tmp_path / "tiny" / "monday_slurm17")
    work(Path(first), [])
    begun(tmp_path / "tiny" / "monday_slurm18", at=time.time() + 20)  # another job's
    assert choose_folder(str(tmp_path), "tiny", "tuesday", None) == str(tmp_path / "tiny" / "tuesday_slurm17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose_folder(str(tmp_path), "tiny", "tuesday", None) == first
    assert starting_point(None, Path(first)) is None  # killed before its first checkpoint
    assert starting_point("last", Path(first)) is None
    checkpoint = saved(Path(first))
    assert starting_point(None, Path(first)) == str(checkpoint)


@pytest.mark.usefixtures("in_slurm")
def test_runs_of_one_job_are_told_apart_by_their_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [work(tmp_path / "tiny" / f"s{seed}", [f"seed={seed}"]) for seed in (0, 1)]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for seed in (0, 1):
        assert choose_folder(str(tmp_path), "tiny", "now", None, seed, [f"seed={seed}"]) == str(folders[seed])
    assert choose_folder(str(tmp_path), "tiny", "now", None, 2, ["seed=2"]) == str(tmp_path / "tiny" / "now_slurm17")  # not begun yet


@pytest.mark.usefixtures("in_slurm")
def test_a_requeued_job_goes_on_from_its_own_last_state_wherever_its_command_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, command = tmp_path / "downloads" / "batch_4.ckpt", ["ckpt_path=..."]
    other.mkdir(parents=True)
    folder = work(Path(choose_folder(str(tmp_path), "tiny", "monday", str(other), 0, command)), command)
    assert starting_point(str(other), folder) == str(other)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose_folder(str(tmp_path), "tiny", "tuesday", str(other), 0, command) == str(folder)
    assert starting_point(str(other), folder) == str(other)  # nothing saved yet
    checkpoint = saved(folder)
    assert starting_point(str(other), work(folder, command)) == str(checkpoint)


@pytest.mark.usefixtures("in_slurm")
def test_a_job_that_was_stopped_before_it_trained_begins_where_its_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "tiny" / "run")
    earlier = checkpoint.with_name("batch_2.ckpt")
    earlier.mkdir()
    os.utime(checkpoint.with_name("last.ckpt"), (10, 10), follow_symlinks=False)
    folder = work(tmp_path / "tiny" / "run", ["ckpt_path=earlier"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert starting_point(str(earlier), work(folder, ["ckpt_path=earlier"])) == str(earlier)
    assert starting_point("last", folder) == str(checkpoint)


def test_where_a_run_starts(tmp_path: Path) -> None:
    assert starting_point(None, tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path=last: the run in .* has no checkpoint yet; without ckpt_path it begins anew$"):
        starting_point("last", tmp_path)
    checkpoint = saved(tmp_path)
    assert starting_point("last", tmp_path) == str(checkpoint)
    assert starting_point(str(checkpoint.parent / "last.ckpt"), tmp_path) == str(checkpoint)  # the link moves on, this does not
    with pytest.raises(RuntimeError, match=r"holds a run already: go on with it by ckpt_path=last, or name another folder"):
        starting_point(None, tmp_path)
    checkpoint.rename(checkpoint.with_name(".batch_4.ckpt.77.replaced"))  # killed while it was replaced
    assert starting_point("last", tmp_path) == str(checkpoint)
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
    with alone_in(tmp_path), alone_in(tmp_path):  # one process may, for Hydra's sake
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()


def hydra_config(folder: Path, **settings: object) -> DictConfig:
    """What Hydra hands its callbacks, as far as is looked at."""
    logging = {"root": {"handlers": ["console", "file"]}}
    hydra = {"run": {"dir": str(folder)}, "output_subdir": ".hydra", "overrides": {"task": []}, "job_logging": logging}
    return OmegaConf.create({"ckpt_path": None, "dry_run": False, **settings, "hydra": hydra})


def test_a_run_is_refused_before_hydra_writes_and_rank_zero_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, config = OwnFolder(), hydra_config(tmp_path)
    callback.on_run_start(config)
    assert config.hydra.output_subdir == ".hydra"
    callback.on_run_end(config)
    saved(tmp_path)
    with pytest.raises(SystemExit, match=rf"^train\.py: {tmp_path} holds a run already: go on with it by ckpt_path=last"):
        OwnFolder().on_run_start(hydra_config(tmp_path))
    dry = hydra_config(tmp_path, dry_run=True)
    OwnFolder().on_run_start(dry)
    assert dry.hydra.output_subdir is None
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    other = hydra_config(tmp_path)
    OwnFolder().on_run_start(other)
    assert other.hydra.output_subdir is None
    assert other.hydra.job_logging.root.handlers == ["console"]


def test_last_is_not_a_run_that_failed_before_it_had_begun(tmp_path: Path) -> None:
    good = begun(tmp_path / "tiny" / "a", 10)
    write_settings(good, {"seed": 0})
    begun(tmp_path / "tiny" / "b", 20)  # with a lock and no settings, whatever its seed was
    assert choose_folder(str(tmp_path), "tiny", "now", "last", seed=0) == str(good)
