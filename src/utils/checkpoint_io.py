"""Checkpoints as folders: weights as safetensors, the rest for weights-only loading, and a list of both with checksums.

batch_40.ckpt/weights.safetensors   the module's state dict
batch_40.ckpt/state.pt              optimiser, scheduler, loops, random states, callbacks
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
from torch import Tensor

WEIGHTS, STATE, CONTENTS = "weights.safetensors", "state.pt", "checkpoint.json"
ABOUT = "about"
"""Key of a checkpoint whose plain values are written into checkpoint.json, for people."""

_BLOCK = 1 << 24
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or could not be written."""


class FolderCheckpoints(CheckpointIO):
    """Writes and reads such folders for Lightning's trainer; single files of `torch.save` are read too.

    A folder is written aside, brought to the disk and renamed: it is whole or not there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        """Writes a checkpoint; one of that name is replaced.

        Raises:
            CheckpointError: the disk is full; what was written of it is removed.
            OSError: anything else that went wrong on the way to the disk.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        remove(aside)
        try:
            aside.mkdir()
            _write(checkpoint, aside)
        except (OSError, SafetensorError, RuntimeError) as error:
            remove(aside)
            if _is_full(error):
                raise CheckpointError(
                    f"no room to write {path} ({_short(error)}); checkpoints that were there before are whole. Free some and go on "
                    "with ckpt_path=last"
                ) from error
            raise
        if path.is_symlink() or path.exists():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
            path.rename(replaced)
            aside.rename(path)
            remove(replaced)
        else:
            aside.rename(path)
        _to_disk(path.parent)

    def load_checkpoint(self, path: Path | str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, all of it checked against its checksums; tensors lie on the CPU.

        Raises:
            FileNotFoundError: nothing there.
            CheckpointError: not whole; the message names the newest whole one beside it.
        """
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Path | str) -> None:
        """Removes a checkpoint, if it is there."""
        remove(Path(path))


def read_checkpoint(path: Path | str, mapped: bool = False) -> dict[str, Any]:
    """See FolderCheckpoints.load_checkpoint; `mapped` reads what is not looked at (of the optimiser, say) never into memory."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: training writes them to <output_dir>/checkpoints")
    try:
        check(path)
        return _read(path, mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {other_checkpoint(path)}") from error


def check(path: Path) -> None:
    """Compares a folder's files with its list of them.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    if not path.is_dir():
        return  # a single file: reading it is the only check there is
    for name, expected in ({WEIGHTS: None, STATE: None} | contents(path)["files"]).items():
        if not isinstance(expected, dict) or Path(name).name != name:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {CONTENTS} is broken, it says {expected!r} of {name}")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {name} is missing")
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {name} has {size} bytes of {expected.get('bytes')}")
        if _checksum(file) != expected.get("crc32"):
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {name} is not what was written (its checksum differs)")


def contents(path: Path) -> dict[str, Any]:
    """checkpoint.json of a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        found = json.loads((path / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {CONTENTS} is missing or broken") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {CONTENTS} lists no files")
    return found


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoints of a folder that pass `check`, newest first; links to them are left out."""
    found = [path for path in folder.glob("*.ckpt") if not path.is_symlink() and path.is_dir()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check(path)
        except CheckpointError:
            continue
        yield path


def remove(path: Path) -> None:
    """Removes a checkpoint; renamed first, so that a process killed meanwhile leaves none that looks whole."""
    if not path.is_symlink() and not path.exists():
        return
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.{os.getpid()}.removed")
    if doomed != path:
        path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def tidy(folder: Path) -> None:
    """Removes what killed processes left half written or half removed; one that was being replaced is put back."""
    for leftover in folder.glob(".*.ckpt.*"):
        place = folder / (leftover.name[1:].rpartition(".ckpt.")[0] + ".ckpt")
        if leftover.suffix == ".replaced" and not place.exists():
            leftover.rename(place)
        else:
            remove(leftover)


def other_checkpoint(path: Path) -> str:
    """What to do where a checkpoint is of no use, as the end of a sentence."""
    path = path.resolve()
    for other in whole_checkpoints(path.parent):
        if other != path:
            return f"{other} is whole: go on with ckpt_path={other}"
    return "there is no other whole checkpoint beside it"


def _write(checkpoint: dict[str, Any], folder: Path) -> None:
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", ABOUT)}
    weights, twins = _apart(checkpoint["state_dict"])
    save_file(weights, folder / WEIGHTS, metadata={"twins": json.dumps(twins)})
    with open(folder / STATE, "wb") as file:
        torch.save(rest, file)
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": _checksum(folder / name)} for name in (WEIGHTS, STATE)}
    text = json.dumps({**checkpoint.get(ABOUT, {}), "files": files}, indent=2)
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")
    for name in (WEIGHTS, STATE, CONTENTS):
        _to_disk(folder / name)
    _to_disk(folder)


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        if not path.is_dir():
            whole = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(whole, dict) or "state_dict" not in whole:
                raise CheckpointError(f"{path} is not a checkpoint: it holds no weights")
            return whole
        with safe_open(path / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            twins = (file.metadata() or {}).get("twins", "{}")
        rest = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_short(error)}") from error
    if not isinstance(rest, dict):
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {STATE} holds no state")
    return {**rest, "state_dict": weights | _twins(path, weights, twins)}


def _twins(path: Path, weights: Mapping[str, Tensor], listed: str) -> dict[str, Tensor]:
    try:
        twins = json.loads(listed)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: its list of tied weights is broken") from error
    if not isinstance(twins, dict) or not all(isinstance(first, str) and first in weights for first in twins.values()):
        raise CheckpointError(f"{path} cannot be read as a checkpoint: its list of tied weights names others than it holds")
    return {name: weights[first] for name, first in twins.items()}


def _apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and the names of those that are another's twin (tied weights)."""
    weights: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    twins: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in first:
            twins[name] = first[place]
        else:
            first[place] = name
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            weights[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return weights, twins


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no room."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or any(f"os error {number}" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
