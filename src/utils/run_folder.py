"""The folder of a run: which one it is, who works in it, and where a run goes on that stopped in it."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from src.utils.checkpoint_io import CheckpointError, other_checkpoint
from src.utils.preemption import restarted

log = logging.getLogger(__name__)

LOCK = "run.lock"
"""Held by the process that trains in a folder; names it, and stays when the run has ended."""
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"


def choose_folder(root: str, name: str, now: str, ckpt_path: str | None) -> str:
    """The folder of the run that the command line asks for.

    That of the run that is gone on with: `last`, the one of this name that was started last; a checkpoint
    `<run>/checkpoints/<any>.ckpt`, its own; for a job that Slurm has requeued, the job's. Else a new one, <root>/<name>/<now>,
    with the job's number behind it under Slurm, so that it is found again.
    """
    job = SLURMEnvironment.job_id()
    mine = f"_slurm{job}" if job is not None else ""
    if ckpt_path == "last" or (ckpt_path is None and restarted()):
        begun = list(Path(root, name).glob(f"*{mine if ckpt_path is None else ''}/{LOCK}"))
        if begun:
            return str(max(begun, key=lambda lock: lock.stat().st_mtime).parent)
    elif ckpt_path is not None:
        run = Path(ckpt_path).absolute().parent.parent
        if Path(ckpt_path).absolute().parent.name == CHECKPOINTS and (run / LOCK).exists():
            return str(run)
    return str(Path(root, name, now + mine))


def register_resolver() -> None:
    """Makes `choose_folder` known to configs as ${run_folder:...}; one answer a process, as the folder changes what is asked."""
    OmegaConf.register_new_resolver("run_folder", choose_folder, use_cache=True, replace=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a run's folder (on rank 0); a process that ends, however it ends, lets go of it.

    Raises:
        RuntimeError: another process holds it.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = (folder / LOCK).read_text(encoding="utf-8").strip()
        raise RuntimeError(f"{folder} is in use by {owner}: wait for it, or name another folder with hydra.run.dir=") from error
    try:
        # its time of change is what `last` goes by
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def starting_point(ckpt_path: str | None, folder: Path) -> str | None:
    """The checkpoint to begin with: `last` (a requeued job's default) is that of the run's folder; None begins anew.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: the last one is gone; names another.
        RuntimeError: the folder holds checkpoints of a run, and nobody said that it is to go on.
    """
    last = folder / CHECKPOINTS / LAST
    if last.is_symlink() and not last.exists() and ckpt_path in (None, "last"):
        raise CheckpointError(f"{last} leads to a checkpoint that is gone; {other_checkpoint(last)}")
    if ckpt_path == "last" or (ckpt_path is None and restarted()):
        if not last.exists():
            log.info("no checkpoint in %s yet: the run begins at its beginning", folder)
            return None
        ckpt_path = str(last)
    elif ckpt_path is None:
        if last.exists():
            raise RuntimeError(f"{folder} holds a run already: go on with it by ckpt_path=last, or name another folder with hydra.run.dir=")
        return None
    found = Path(ckpt_path).resolve()  # a link moves on while the run does
    if not found.exists():
        raise FileNotFoundError(f"no checkpoint at {ckpt_path}: training writes them to <output_dir>/{CHECKPOINTS}")
    log.info("going on from %s", found)
    return str(found)
