"""Which folder and checkpoint a run takes, and that no other process works in the folder."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from src.utils.checkpoint_io import CheckpointError
from src.utils.run_folder import ReserveFolder, choose_folder, reserve_folder, starting_point
from src.utils.run_settings import write_settings

Choose = Callable[..., Path]


@pytest.fixture
def choose(tmp_path: Path) -> Choose:
    """(ckpt_path, **settings) -> the folder, below the root, of a run of "tiny" at "now"."""

    def chosen(ckpt_path: str | None, name: str = "tiny", now: str = "now", **settings: object) -> Path:
        return Path(choose_folder(str(tmp_path), name, now, ckpt_path, **settings)).relative_to(tmp_path)

    return chosen


@pytest.fixture
def requeue(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts the process into Slurm's job 17; a call tells it that the job was requeued."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "grace")
    return lambda: monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def started(folder: Path, at: float, **settings: object) -> Path:
    """Makes a folder in which a run was started; without settings it failed before training."""
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    os.utime(folder / "run.lock", (at, at))
    if settings:
        write_settings(folder, settings)
    return folder


def saved(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "batch_4.ckpt"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "last.ckpt").symlink_to(checkpoint.name)
    return checkpoint


def work(folder: Path, overrides: list[str]) -> Path:
    """Reserves a folder and releases it, as a process does that starts and ends there."""
    with reserve_folder(folder, overrides):
        return folder


# ---- which folder


def test_last_is_the_run_started_last(tmp_path, choose):
    started(tmp_path / "tiny" / "b", at=10)
    started(tmp_path / "tiny" / "a", at=20)  # an older run that was resumed since
    (tmp_path / "tiny" / "c").mkdir()  # where nothing was trained
    assert choose("last") == Path("tiny/a")
    assert choose(None) == Path("tiny/now")
    with pytest.raises(FileNotFoundError, match=rf"no run with seed=0 was begun in {tmp_path}/other$"):
        choose("last", name="other", seed=0)


def test_last_has_same_seed_and_trained(tmp_path, choose):
    for seed, at in ((0, 10), (1, 20)):
        started(tmp_path / "tiny" / f"s{seed}", at, seed=seed)
    started(tmp_path / "tiny" / "failed", 30)
    assert choose("last", seed=0) == Path("tiny/s0")
    (tmp_path / "tiny" / "failed" / "run.lock").unlink()
    with pytest.raises(FileNotFoundError, match=rf"seed=2 .*of another seed there is ckpt_path={tmp_path}/tiny/s1/checkpoints/"):
        choose("last", seed=2)


def test_checkpoint_names_its_run_folder(tmp_path, choose):
    run = started(tmp_path / "tiny" / "a", at=10)
    saved(run)
    for name in ("last.ckpt", "batch_4.ckpt"):
        assert choose(f"{run}/checkpoints/{name}") == Path("tiny/a")
    assert choose(f"{tmp_path}/downloads/last.ckpt") == Path("tiny/now")


def test_requeued_job_finds_its_folder(tmp_path, choose, requeue):
    first = tmp_path / choose(None, now="monday")
    assert first == tmp_path / "tiny" / "monday_slurm17"
    work(first, [])
    started(tmp_path / "tiny" / "monday_slurm18", at=time.time() + 20)  # of another job
    assert choose(None, now="tuesday") == Path("tiny/tuesday_slurm17")
    requeue()
    assert tmp_path / choose(None, now="tuesday") == first
    assert starting_point(None, first) is None  # killed before its first checkpoint
    assert starting_point("last", first) is None
    assert str(saved(first)) == starting_point(None, first)


def test_commands_tell_runs_of_a_job_apart(tmp_path, choose, requeue):
    for seed in (0, 1):
        work(tmp_path / "tiny" / f"s{seed}", [f"seed={seed}"])
    requeue()
    for seed, folder in ((0, "s0"), (1, "s1"), (2, "now_slurm17")):  # the last was not started yet
        assert choose(None, seed=seed, overrides=[f"seed={seed}"]) == Path("tiny", folder)


# ---- which checkpoint


def test_requeued_job_resumes_from_its_own_state(tmp_path, choose, requeue):
    other, command = tmp_path / "downloads" / "batch_4.ckpt", ["ckpt_path=..."]
    other.mkdir(parents=True)
    folder = work(tmp_path / choose(str(other), seed=0, overrides=command), command)
    assert starting_point(str(other), folder) == str(other)
    requeue()
    assert tmp_path / choose(str(other), now="tuesday", seed=0, overrides=command) == folder
    assert starting_point(str(other), folder) == str(other)  # nothing saved yet
    checkpoint = saved(folder)
    assert starting_point(str(other), work(folder, command)) == str(checkpoint)


def test_requeued_job_without_checkpoint_starts_as_told(tmp_path, requeue):
    checkpoint = saved(tmp_path / "run")
    earlier = checkpoint.with_name("batch_2.ckpt")
    earlier.mkdir()
    os.utime(checkpoint.with_name("last.ckpt"), (10, 10), follow_symlinks=False)
    folder = work(tmp_path / "run", ["ckpt_path=earlier"])
    requeue()
    assert starting_point(str(earlier), work(folder, ["ckpt_path=earlier"])) == str(earlier)
    assert starting_point("last", folder) == str(checkpoint)


def test_starting_point(tmp_path):
    assert starting_point(None, tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path=last: .* no checkpoint yet"):
        starting_point("last", tmp_path)
    checkpoint = saved(tmp_path)
    assert starting_point("last", tmp_path) == str(checkpoint)
    assert starting_point(str(checkpoint.parent / "last.ckpt"), tmp_path) == str(checkpoint)  # the link moves, this does not
    with pytest.raises(RuntimeError, match=r"holds a run already: .*ckpt_path=last.*hydra.run.dir="):
        starting_point(None, tmp_path)
    checkpoint.rename(checkpoint.with_name(".batch_4.ckpt.77.replaced"))  # killed while it was replaced
    assert starting_point("last", tmp_path) == str(checkpoint)
    checkpoint.rmdir()
    with pytest.raises(CheckpointError, match=r"last.ckpt leads to a checkpoint that is gone; there is no other"):
        starting_point("last", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at /nowhere/last\.ckpt"):
        starting_point("/nowhere/last.ckpt", tmp_path)


# ---- one process


def test_second_process_in_a_folder_is_refused(tmp_path):
    holder = os.fork()
    if holder == 0:
        with reserve_folder(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=rf"in use by process {holder} on"), reserve_folder(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with reserve_folder(tmp_path), reserve_folder(tmp_path):  # may be nested
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()


def test_refused_run_writes_nothing(tmp_path, monkeypatch):
    def start(**settings):
        logging = {"root": {"handlers": ["console", "file"]}}
        hydra = {"run": {"dir": str(tmp_path)}, "output_subdir": ".hydra", "overrides": {"task": []}, "job_logging": logging}
        config = OmegaConf.create({"ckpt_path": None, "dry_run": False, **settings, "hydra": hydra})
        callback = ReserveFolder()
        callback.on_run_start(config)
        callback.on_run_end(config)
        return config

    assert start().hydra.output_subdir == ".hydra"
    saved(tmp_path)
    with pytest.raises(SystemExit, match=rf"^train\.py: {tmp_path} holds a run already"):
        start()
    assert start(dry_run=True).hydra.output_subdir is None
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    other = start()
    assert other.hydra.output_subdir is None
    assert other.hydra.job_logging.root.handlers == ["console"]
