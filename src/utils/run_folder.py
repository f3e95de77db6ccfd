"""The folder of a run: which one it is, who works in it, and where a run goes on that stopped in it."""

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
"""Held by the process that trains in a folder; names it, and its place in a scheduler's job; stays when the run has ended."""
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
_SINCE = "since "

# ---- which folder


def choose_folder(root: str, name: str, now: str, ckpt_path: str | None, seed: int | None = None, overrides: Sequence[str] = ()) -> str:
    """The folder of the run that the command line asks for.

    For a job that a scheduler has started again, the one that the same command was at work in; its command line tells a job's
    runs apart. Else that of the run that is gone on with: `last`, the one of this name and seed that was started last
    (and did not fail before it had begun); a
    checkpoint `<run>/checkpoints/<any>.ckpt`, its own. Else a new one, <root>/<name>/<now>, with Slurm's number of the job.

    Raises:
        FileNotFoundError: `last`, and there is no such run; names others of this name.
    """
    job, number = place_in_job(overrides), SLURMEnvironment.job_id()
    begun = sorted(Path(root, name).glob(f"*/{LOCK}"), key=lambda lock: lock.stat().st_mtime, reverse=True)
    alike = [lock.parent for lock in begun if _has_seed(lock.parent, seed)]
    if restarted():
        own = [lock.parent for lock in begun if job in lock.read_text(encoding="utf-8").splitlines()] if job else alike
        if own:
            return str(own[0])
    if ckpt_path == "last":
        trained = [folder for folder in alike if read_settings(folder) is not None]  # others failed before they had begun
        if trained or alike:
            return str((trained or alike)[0])
        if not restarted():
            others = f"; of another seed there is ckpt_path={begun[0].parent / CHECKPOINTS / LAST}" if begun else ""
            raise FileNotFoundError(f"ckpt_path=last: no run with seed={seed} was begun in {Path(root, name)}{others}")
    elif ckpt_path is not None:
        run = Path(ckpt_path).absolute().parent.parent
        if Path(ckpt_path).absolute().parent.name == CHECKPOINTS and (run / LOCK).exists():
            return str(run)
    return str(Path(root, name, now + ("" if number is None else f"_slurm{number}")))


def place_in_job(overrides: Sequence[str]) -> str | None:
    """What tells a run from others of the same scheduler's job, also after a restart; None outside of one."""
    slurm, torchrun = SLURMEnvironment.job_id(), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if slurm is None and torchrun == "none":
        return None
    command = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:16]
    return f"job {torchrun if slurm is None else slurm}, command {command}"


def _has_seed(folder: Path, seed: int | None) -> bool:
    settings = read_settings(folder)
    return seed is None or settings is None or settings.get("seed") == seed


def _plain(overrides: Any) -> list[str]:
    found: Any = OmegaConf.to_container(overrides, resolve=False)  # with interpolations in the place of secrets
    return [str(override) for override in found]


def register_resolver() -> None:
    """Makes `choose_folder` known to configs as ${run_folder:...}; one answer a process, as the folder changes what is asked."""

    def answer(root: str, name: str, now: str, ckpt_path: str | None, seed: int, overrides: Any) -> str:
        try:
            return choose_folder(root, name, now, ckpt_path, seed, _plain(overrides))
        except FileNotFoundError as error:  # as an error in an interpolation it would be four lines
            raise SystemExit(f"train.py: {error}") from error

    OmegaConf.register_new_resolver("run_folder", answer, use_cache=True, replace=True)
    register_machine_resolvers()


# ---- who works in it


@contextmanager
def alone_in(folder: Path, overrides: Sequence[str] | None = None) -> Iterator[None]:
    """Holds a run's folder (on rank 0); a process that ends, however it ends, lets go of it. It may hold it more than once.

    Args:
        overrides: the command line; that of Hydra, if it is at work.

    Raises:
        RuntimeError: another process holds it.
    """
    if not _leads():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = (folder / LOCK).read_text(encoding="utf-8").partition("\n")[0]
        raise RuntimeError(f"{folder} is in use by {owner}: wait for it, or name another folder with hydra.run.dir=") from error
    try:
        if overrides is None:
            overrides = _plain(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()
        lines = [f"process {os.getpid()} on {socket.gethostname()}"]
        if job := place_in_job(overrides):
            before = (folder / LOCK).read_text(encoding="utf-8")
            (folder / LOCK).touch()  # files and links have their times by the file system's clock
            lines += [job, f"{_SINCE}{_since(folder) if job in before.splitlines() else (folder / LOCK).stat().st_mtime}"]
        # its time of change is what `last` goes by
        with open(folder / LOCK, "r+", encoding="utf-8") as file:  # never empty meanwhile, as other ranks read it
            file.write("\n".join(lines) + "\n")
            file.truncate()
        yield
    finally:
        lock.release()


def _since(folder: Path) -> float:
    """When the job that is in a folder came there first; 0 outside of one."""
    lines = (folder / LOCK).read_text(encoding="utf-8").splitlines() if (folder / LOCK).exists() else []
    return max((float(line.removeprefix(_SINCE)) for line in lines if line.startswith(_SINCE)), default=0.0)


class OwnFolder(Callback):
    """Hydra's callback that takes a run's folder before Hydra writes its configs there: a run that is refused leaves no trace.

    Rank zero alone writes them, and train.log; a dry run writes none. The points of a sweep have folders of their own.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with read_write(config), open_dict(config):
            if not _leads():
                config.hydra.job_logging.root.handlers = ["console"]
            if not _leads() or config.dry_run:
                config.hydra.output_subdir = None
                return
        folder = Path(config.hydra.run.dir).absolute()
        try:
            self._held.enter_context(alone_in(folder, _plain(config.hydra.overrides.task)))
            refuse_to_mix(config.ckpt_path, folder)
        except RuntimeError as error:  # Hydra would make a warning of it, and go on
            raise SystemExit(f"train.py: {error}") from error

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        self._held.close()


def _leads() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


# ---- where it goes on


def refuse_to_mix(ckpt_path: str | None, folder: Path) -> None:
    """Refuses to begin where a run has been.

    Raises:
        RuntimeError: the folder holds checkpoints of a run, and nobody said that it is to go on.
    """
    if ckpt_path is None and not restarted() and (folder / CHECKPOINTS / LAST).exists():
        raise RuntimeError(f"{folder} holds a run already: go on with it by ckpt_path=last, or name another folder with hydra.run.dir=")


def starting_point(ckpt_path: str | None, folder: Path) -> str | None:
    """The checkpoint to begin with; None begins anew.

    `last` is that of the run's folder. A job that was started again begins with it too, also where its command line names another
    checkpoint: that one became the last when the job's training began. If there is none yet, as its command line says, or anew.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: the last one is gone; names another.
        RuntimeError: as of `refuse_to_mix`.
    """
    last = folder / CHECKPOINTS / LAST
    if _leads():
        tidy(last.parent)  # puts back what a killed process was replacing; until then a link may lead nowhere
    if restarted() and (last.is_symlink() or last.exists()) and (ckpt_path in (None, "last") or last.lstat().st_mtime >= _since(folder)):
        ckpt_path = str(last)
    if last.is_symlink() and not last.exists() and ckpt_path in (None, "last", str(last)):
        if not _leads():
            return str(last.resolve())  # rank zero may be putting it back, or says that it is gone
        raise CheckpointError(f"{last} leads to a checkpoint that is gone; {other_checkpoint(last)}")
    refuse_to_mix(ckpt_path, folder)
    if ckpt_path == "last":
        if last.exists():
            ckpt_path = str(last)
        elif restarted():
            ckpt_path = None
        else:
            raise FileNotFoundError(f"ckpt_path=last: the run in {folder} has no checkpoint yet; without ckpt_path it begins anew")
    if ckpt_path is None:
        if restarted():
            log.info("no checkpoint in %s yet: the run begins at its beginning", folder)
        return None
    found = Path(ckpt_path).resolve()  # a link moves on while the run does
    if not found.exists():
        raise FileNotFoundError(f"no checkpoint at {ckpt_path}: training writes them to <output_dir>/{CHECKPOINTS}")
    log.info("going on from %s", found)
    return str(found)
