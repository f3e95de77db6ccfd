"""Folders that are made beside their place and renamed into it, and what killed processes leave of them."""

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, for this process alone; in the end it is gone, unless it was renamed.

    A lock file beside it, held from before the folder is there until it is not, tells it from what killed processes left.
    """
    for left in folder.parent.glob(f"{folder.name}.*"):
        if left.is_dir():
            _remove_unless_held(left)
    aside = folder.with_name(f"{folder.name}.{uuid4().hex[:8]}")
    lock_file = _lock_of(aside)
    with lock_file.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            lock_file.unlink()


def _lock_of(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.lock")


def _remove_unless_held(aside: Path) -> None:
    with _lock_of(aside).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        log.info("removing %s, which a killed preparation has left", aside)
        shutil.rmtree(aside, ignore_errors=True)
        _lock_of(aside).unlink(missing_ok=True)
