"""Files and folders that are complete or absent: they are written beside their place and renamed."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)


def write_atomic(file: Path, text: str) -> None:
    """Writes a UTF-8 text file. Several processes may write the same file at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, and renames it to `folder` when the block ends without an error.

    If another process has made `folder` by then, that one stays. A lock file beside the temporary folder is held while the
    folder is in use. It is how the next call for the same `folder` recognises, and removes, what a killed process left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.*"):
        if left.is_dir():
            _remove_if_abandoned(left)
    partial = folder.with_name(f"{folder.name}.{uuid4().hex[:8]}")
    lock_file = _lock_file(partial)
    with lock_file.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial.mkdir()
        try:
            yield partial
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_file.unlink()


def _lock_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _remove_if_abandoned(partial: Path) -> None:
    with _lock_file(partial).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        log.info("removing %s, left by a process that was killed", partial)
        shutil.rmtree(partial, ignore_errors=True)
        _lock_file(partial).unlink(missing_ok=True)
