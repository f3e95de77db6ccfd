"""Files and folders that are complete or absent: they are written beside their place and renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def write_atomic(file: Path, text: str) -> None:
    """Writes a UTF-8 text file. Several processes may write the same file at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def make_folder_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Returns `folder`; if it does not exist, makes it by `write`, which is given an empty folder that is then renamed.

    Other processes that want the same folder wait. The lock of a killed process ends with it, and the next one removes its
    unfinished folder.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder
