"""Checkpoints as folders: weights as safetensors, the rest for weights-only loading, and a list of both with checksums.

batch_40.ckpt/weights.safetensors   the module's state dict
batch_40.ckpt/state.pt              optimizer, scheduler, loops, random states, callbacks
batch_40.ckpt/checkpoint.json       what it is (batches, score), sizes and checksums of the files
"""

import errno
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

WEIGHTS, STATE, CONTENTS = "weights.safetensors", "state.pt", "checkpoint.json"
ABOUT = "about"
"""Key of a checkpoint whose plain values are written to checkpoint.json, for people."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(ValueError):
    """A checkpoint is damaged or could not be written."""


class FolderCheckpoints(CheckpointIO):
    """Writes and reads checkpoint folders for Lightning's trainer; reads single files of `torch.save` too.

    A folder is written under a temporary name, synced to disk and renamed: it is complete or not there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        """Writes a checkpoint; replaces one of that name.

        Raises:
            CheckpointError: the disk is full; what was written of it is removed.
            OSError: any other failure of the file system.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(path, "partial")
        remove(partial)
        try:
            partial.mkdir()
            _write(checkpoint, partial)
        except (OSError, SafetensorError, RuntimeError) as error:
            remove(partial)
            if _is_disk_full(error):
                raise CheckpointError(
                    f"no room to write {path} ({_first_line(error)}); checkpoints that were there before are intact. Free some and go on "
                    "with ckpt_path=last"
                ) from error
            raise
        if path.is_symlink() or path.exists():
            path.rename(_hidden(path, "replaced"))
            partial.rename(path)
            remove(_hidden(path, "replaced"))
        else:
            partial.rename(path)
        _sync(path.parent)

    def load_checkpoint(self, path: Path | str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Path | str) -> None:
        remove(Path(path))


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Returns a checkpoint, a folder or a single file of `torch.save`, with tensors on the CPU.

    Files of a folder are mapped into memory: of sharded weights a rank reads its share, and what ranks of one machine read is read once.
    Of several ranks the first alone compares the files with their checksums, for which it reads all of them.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged; the message names the newest intact checkpoint beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: training writes them to <output_dir>/checkpoints")
    try:
        check(path, checksums=not distributed.is_initialized() or distributed.get_rank() == 0)
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {other_checkpoint(path)}") from error


def check(path: Path, checksums: bool = True) -> None:
    """Compares a folder's files with checkpoint.json, by their sizes and `checksums`. A single file has no other check than reading it.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    if not path.is_dir():
        return
    try:
        files = json.loads((path / CONTENTS).read_text(encoding="utf-8"))["files"]
        expected = {name: (files[name]["bytes"], files[name]["crc32"]) for name in (WEIGHTS, STATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{CONTENTS} is missing or broken") from error
    for name, (size, checksum) in expected.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes of {size}")
        if checksums and _checksum(file) != checksum:
            raise _damaged(path, f"{name} is not what was written (its checksum differs)")


def intact_checkpoints(folder: Path) -> Iterator[Path]:
    """Yields the checkpoint folders that pass `check`, newest first; no links."""
    found = [path for path in folder.glob("*.ckpt") if not path.is_symlink() and path.is_dir()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check(path)
        except CheckpointError:
            continue
        yield path


def remove(path: Path) -> None:
    """Removes a checkpoint; renames it first, so that a process killed meanwhile leaves none that looks complete."""
    if not path.is_symlink() and not path.exists():
        return
    doomed = path if path.name.startswith(".") else path.rename(_hidden(path, "removed"))
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def tidy(folder: Path) -> None:
    """Removes what killed processes left half written or half removed; restores a checkpoint that was being replaced."""
    for leftover in folder.glob(".*.ckpt.*"):
        place = folder / (leftover.name[1:].rpartition(".ckpt.")[0] + ".ckpt")
        if leftover.suffix == ".replaced" and not place.exists():
            leftover.rename(place)
        else:
            remove(leftover)


def other_checkpoint(path: Path) -> str:
    """Returns what to do if a checkpoint cannot be used, as the end of a sentence."""
    path = path.resolve()
    for other in intact_checkpoints(path.parent):
        if other != path:
            return f"{other} is intact: go on with ckpt_path={other}"
    return "there is no other intact checkpoint beside it"


def _write(checkpoint: dict[str, Any], folder: Path) -> None:
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", ABOUT)}
    weights, twins = _without_ties(checkpoint["state_dict"])
    save_file(weights, folder / WEIGHTS, metadata={"twins": json.dumps(twins)})
    with open(folder / STATE, "wb") as file:
        torch.save(rest, file)
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": _checksum(folder / name)} for name in (WEIGHTS, STATE)}
    text = json.dumps({**checkpoint.get(ABOUT, {}), "files": files}, indent=2)
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")
    for path in (folder / WEIGHTS, folder / STATE, folder / CONTENTS, folder):
        _sync(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_dir():
            single = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(single, dict) or "state_dict" not in single:
                raise CheckpointError(f"{path} is not a checkpoint: it holds no weights")
            return single
        with safe_open(path / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            twins = (file.metadata() or {}).get("twins", "{}")
        rest = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise _damaged(path, _first_line(error)) from error
    if not isinstance(rest, dict):
        raise _damaged(path, f"{STATE} holds no state")
    try:
        tied = {name: weights[first] for name, first in json.loads(twins).items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(path, f"its list of tied weights ({twins[:60]}) does not fit its weights") from error
    return {**rest, "state_dict": weights | tied}


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors that share no memory, and for each tied tensor the name of the one that is kept."""
    weights: dict[str, Tensor] = {}
    kept: dict[Any, str] = {}
    twins: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if kept.setdefault(place, name) != name:
            twins[name] = kept[place]
            continue
        exclusive = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        weights[name] = tensor if exclusive else tensor.clone(memory_format=torch.contiguous_format)
    return weights, twins


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one that caused it, says that the disk is full (safetensors says so in its text only)."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _DISK_FULL) or any(f"os error {number}" in str(error) for number in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as a checkpoint: {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
