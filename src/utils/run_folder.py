"""The folder of a run: which one it is, which process holds it, and which checkpoint a run resumes from."""

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from src.utils.checkpoint_io import CheckpointError, other_checkpoint, tidy
from src.utils.machine import register_machine_resolvers
from src.utils.preemption import restarted
from src.utils.run_settings import read_settings

log = logging.getLogger(__name__)

LOCK = "run.lock"
"""Locked by the process that trains in a folder. It names the process and its place in a scheduler's job, and stays after the run."""
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
ELSEWHERE = "runs_elsewhere.txt"
"""In paths.output_root: the folders of runs that hydra.run.dir put elsewhere, a line each."""
_SINCE = "since "

# ---- which folder


def choose_folder(root: str, name: str, now: str, ckpt_path: str | None, seed: int | None = None, overrides: Sequence[str] = ()) -> str:
    """Returns the folder of the run that the command line asks for.

    - A job that a scheduler has restarted: the folder in which the same command worked (the command tells runs of a job apart).
    - ckpt_path=last: the run of this name and seed that was started last; runs that failed before training only if there is no other.
    - ckpt_path=<run>/checkpoints/<any>.ckpt: that run's folder.
    - Else a new folder, <root>/<name>/<now>, with Slurm's job number if there is one.

    Raises:
        FileNotFoundError: ckpt_path=last, and there is no such run.
    """
    job, number = place_in_job(overrides), SLURMEnvironment.job_id()
    started = sorted(Path(root, name).glob(f"*/{LOCK}"), key=lambda lock: lock.stat().st_mtime, reverse=True)
    same_seed = [lock.parent for lock in started if _has_seed(lock.parent, seed)]
    if restarted():
        same_job = [lock.parent for lock in started if job in lock.read_text(encoding="utf-8").splitlines()] if job else same_seed
        if same_job:
            return str(same_job[0])
    if ckpt_path == "last":
        trained = [folder for folder in same_seed if read_settings(folder) is not None]
        if trained or same_seed:
            return str((trained or same_seed)[0])
        if not restarted():
            others = f"; of another seed there is ckpt_path={started[0].parent / CHECKPOINTS / LAST}" if started else ""
            raise FileNotFoundError(f"ckpt_path=last: no run with seed={seed} was begun in {Path(root, name)}{others}")
    elif ckpt_path is not None:
        checkpoints = Path(ckpt_path).absolute().parent
        if checkpoints.name == CHECKPOINTS and (checkpoints.parent / LOCK).exists():
            return str(checkpoints.parent)
    return str(Path(root, name, now + ("" if number is None else f"_slurm{number}")))


def place_in_job(overrides: Sequence[str]) -> str | None:
    """Returns what identifies a run within a scheduler's job, also after a restart; None outside of a job."""
    slurm, torchrun = SLURMEnvironment.job_id(), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if slurm is None and torchrun == "none":
        return None
    command = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:16]
    return f"job {torchrun if slurm is None else slurm}, command {command}"


def _has_seed(folder: Path, seed: int | None) -> bool:
    settings = read_settings(folder)
    return seed is None or settings is None or settings.get("seed") == seed


def unresolved(overrides: Any) -> list[str]:
    """Returns Hydra's overrides as they were written, secrets as interpolations."""
    found: Any = OmegaConf.to_container(overrides, resolve=False)  # secrets are interpolations
    return [str(override) for override in found]


def register_resolver() -> None:
    """Registers ${run_folder:...}, `choose_folder` for configs; cached, because taking a folder changes the answer."""

    def answer(root: str, name: str, now: str, ckpt_path: str | None, seed: int, overrides: Any) -> str:
        try:
            return choose_folder(root, name, now, ckpt_path, seed, unresolved(overrides))
        except FileNotFoundError as error:  # OmegaConf would make four lines of it
            raise SystemExit(f"train.py: {error}") from error

    OmegaConf.register_new_resolver("run_folder", answer, use_cache=True, replace=True)
    register_machine_resolvers()


def list_run(folder: Path, output_root: Path) -> None:
    """Adds the folder of a run or of its export to the list in `output_root` of those that lie elsewhere, where evaluate.py looks too."""
    folder, output_root = folder.absolute(), output_root.absolute()
    if not any(folder.is_relative_to(place) for place in (output_root, *runs_elsewhere(output_root))):
        output_root.mkdir(parents=True, exist_ok=True)
        with open(output_root / ELSEWHERE, "a", encoding="utf-8") as file:
            file.write(f"{folder}\n")


def runs_elsewhere(output_root: Path) -> list[Path]:
    """Returns the folders of runs that lie outside of `output_root`, as `list_run` noted them."""
    file = output_root / ELSEWHERE
    return [Path(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


# ---- which process holds it


@contextmanager
def reserve_folder(folder: Path, overrides: Sequence[str] | None = None) -> Iterator[None]:
    """Locks a run's folder for this process (rank 0), until it ends in any way. May be nested.

    Args:
        overrides: the command line; default: Hydra's.

    Raises:
        RuntimeError: another process holds the folder.
    """
    if not _is_rank_zero():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = file.read_text(encoding="utf-8").partition("\n")[0]
        raise RuntimeError(f"{folder} is in use by {owner}: wait for it, or name another folder with hydra.run.dir=") from error
    try:
        if overrides is None:
            overrides = unresolved(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()
        lines = [f"process {os.getpid()} on {socket.gethostname()}"]
        if job := place_in_job(overrides):
            same_job = job in file.read_text(encoding="utf-8").splitlines()
            file.touch()  # to compare times of files by the file system's clock
            lines += [job, f"{_SINCE}{_job_start(folder) if same_job else file.stat().st_mtime}"]
        with open(file, "r+", encoding="utf-8") as stream:  # rewritten in place: never empty, as other ranks read it
            stream.write("\n".join(lines) + "\n")
            stream.truncate()
        yield
    finally:
        lock.release()


def _job_start(folder: Path) -> float:
    """Returns the time at which the scheduler's job first took a folder; 0 outside of a job."""
    lines = (folder / LOCK).read_text(encoding="utf-8").splitlines() if (folder / LOCK).exists() else []
    return max((float(line.removeprefix(_SINCE)) for line in lines if line.startswith(_SINCE)), default=0.0)


class ReserveFolder(Callback):
    """Hydra's callback that locks a run's folder before Hydra writes to it, so that a refused run leaves no trace.

    Only rank 0 writes Hydra's configs and train.log; a dry run writes none. Points of a sweep have separate folders.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with read_write(config), open_dict(config):
            if not _is_rank_zero():
                config.hydra.job_logging.root.handlers = ["console"]
            if not _is_rank_zero() or config.dry_run:
                config.hydra.output_subdir = None
                return
        folder = Path(config.hydra.run.dir).absolute()
        try:
            self._held.enter_context(reserve_folder(folder, unresolved(config.hydra.overrides.task)))
            check_unused(config.ckpt_path, folder)
        except RuntimeError as error:  # Hydra would turn it into a warning
            raise SystemExit(f"train.py: {error}") from error

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        self._held.close()
        run = Path(config.hydra.run.dir)
        for folder in (run, run.parent) if config.dry_run else ():  # Hydra made them
            with suppress(OSError):  # not empty, or removed by another process
                folder.rmdir()


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


# ---- which checkpoint


def check_unused(ckpt_path: str | None, folder: Path) -> None:
    """Raises RuntimeError if a new run would start in a folder that holds checkpoints of another."""
    if ckpt_path is None and not restarted() and (folder / CHECKPOINTS / LAST).exists():
        raise RuntimeError(f"{folder} holds a run already: go on with it by ckpt_path=last, or name another folder with hydra.run.dir=")


def starting_point(ckpt_path: str | None, folder: Path) -> str | None:
    """Returns the checkpoint to start from; None starts a new run.

    `last` is the last one of the run's folder. A restarted job takes it too, even if its command names another checkpoint, once
    it has saved one since the job began; before that it starts as its command says.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: the last one is gone; names another.
        RuntimeError: see `check_unused`.
    """
    last = folder / CHECKPOINTS / LAST
    if _is_rank_zero():
        tidy(last.parent)  # completes a replacement that was killed; until then the link may lead nowhere
    saved = last.is_symlink() or last.exists()
    if restarted() and saved and (ckpt_path in (None, "last") or last.lstat().st_mtime >= _job_start(folder)):
        ckpt_path = str(last)
    if last.is_symlink() and not last.exists() and ckpt_path in (None, "last", str(last)):
        if not _is_rank_zero():
            return str(last.resolve())  # rank 0 may be restoring it, or raises
        raise CheckpointError(f"{last} leads to a checkpoint that is gone; {other_checkpoint(last)}")
    check_unused(ckpt_path, folder)
    if ckpt_path == "last":
        if not last.exists() and not restarted():
            raise FileNotFoundError(f"ckpt_path=last: the run in {folder} has no checkpoint yet; without ckpt_path it begins anew")
        ckpt_path = str(last) if last.exists() else None
    if ckpt_path is None:
        if restarted():
            log.info("no checkpoint in %s yet: training starts from the beginning", folder)
        return None
    found = Path(ckpt_path).resolve()  # the link moves while the run goes on
    if not found.exists():
        raise FileNotFoundError(f"no checkpoint at {ckpt_path}: training writes them to <output_dir>/{CHECKPOINTS}")
    log.info("going on from %s", found)
    return str(found)
