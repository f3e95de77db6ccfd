"""Where records lie: a file, a folder of files, or a data set on the hub."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"[-_./]?\d+-of-\d+$")  # of train-00000-of-00005
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")  # the first alone is read


@dataclass(frozen=True)
class DataFile:
    """A file of records.

    Attributes:
        path: where it lies.
        name: its path inside the folder that was asked for; a record's id is this name and a line.
    """

    path: Path
    name: str

    @property
    def stem(self) -> str:
        """The name without its suffixes, and of a shard (train-00000-of-00005) what it shares with the others."""
        whole = str(PurePosixPath(self.name.removesuffix(_PACKED[0])).with_suffix(""))
        return _SHARD.sub("", whole) or whole


def find_files(path: str, patterns: Sequence[str], revision: str | None = None) -> list[DataFile]:
    """The files that `path` stands for, sorted by name.

    Args:
        path: a file; a folder, whose files (and those of its subfolders) that match a pattern are taken; or else the name
            of a data set on the hub, of which the same files are downloaded once.
        patterns: like *.jsonl. A file that is named itself need not match.
        revision: on the hub.

    Raises:
        FileNotFoundError: nothing of that name, or no file in it that matches.
        ValueError: a link in the folder, to a file or to a folder with such files, leads out of it; or files that match but for how
            they are packed, and would be passed over in silence, or read beside what was packed.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix in _PACKED[1:]:
            raise ValueError(f"{path!r} is packed in a way that is not read here: unpack it, or pack it as .gz")
        return [DataFile(local, local.name)]
    if local.is_dir() and (linked := _linked_elsewhere(local, patterns)):
        raise ValueError(f"{path!r} has links to folders that lie elsewhere ({_few(linked)}): copy them there, or name one in their place")
    root = local if local.is_dir() else _download(path, patterns, revision)
    names = _matching(root, patterns)
    left_out = sorted(set(_matching(root, ["*"])) - set(names)) if local.is_dir() else []  # of the hub, nothing else is downloaded
    packed = [name for name in left_out if name.endswith(_PACKED) and _fits(PurePosixPath(name).with_suffix(""), patterns)]
    packed = [name for name in packed if str(PurePosixPath(name).with_suffix("")) not in names]  # else it is there unpacked
    if packed:
        raise ValueError(
            f"{path!r} holds {_few(packed)}, which {' or '.join(patterns)} leaves out: unpack them, name .gz files in datamodule.files "
            "too, or move them elsewhere"
        )
    twice = [name for name in names if any(name + suffix in names for suffix in _PACKED)]
    if twice:
        raise ValueError(f"{path!r} holds {_few(twice)} both as they are and packed: move one of the two elsewhere")
    alike = [name for name in left_out if name.endswith(".json") and _fits(PurePosixPath(f"{name}l"), patterns)]
    if not names:
        raise FileNotFoundError(
            f"no file in {path!r} matches {' or '.join(patterns)}{f' (there is {_few(alike)})' if alike else ''}: give "
            "datamodule.path=<local file>, or datamodule.files"
        )
    if alike:
        log.warning("%s are not read: where they hold records, a line each, name them in datamodule.files too", _few(alike))
    return [DataFile(inside(root, name), name) for name in names]


def _matching(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names in a folder, sorted; hidden ones are left out."""
    matching = {file.relative_to(root).as_posix() for pattern in patterns for file in root.rglob(pattern) if file.is_file()}
    return sorted(name for name in matching if not _hidden(name))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _linked_elsewhere(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names of linked folders with files that match and that are not read in their own place: links to folders are not followed."""
    folders = [Path(folder, name) for folder, names, _ in os.walk(root) for name in names]
    linked = [link for link in folders if link.is_symlink() and not link.resolve().is_relative_to(root.resolve())]
    names = sorted(link.relative_to(root).as_posix() for link in linked if _matching(link, patterns))
    return [name for name in names if not _hidden(name)]


def _fits(name: PurePosixPath, patterns: Sequence[str]) -> bool:
    return any(name.match(pattern) for pattern in patterns)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def inside(folder: Path | str, name: str) -> Path:
    """The path of a file or folder whose name came with the data.

    Links inside the folder are followed, and so are those that the hub's client makes from a snapshot to its blobs.

    Raises:
        ValueError: it lies elsewhere (`../secrets`, `/etc/passwd`, a link to one of them).
    """
    root, path = Path(folder).resolve(), Path(folder, name)
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ValueError(
            f"{name!r} leads out of {str(folder)!r}: data is read from its own folder alone; name the file itself, or copy it there"
        )
    return path


def _download(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    remedy = "give datamodule.path=<local file or folder>"
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"no data at {name!r}: no such file or folder; {remedy}")
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
    except OSError as error:  # all that the hub's client raises for what is not there or not in reach
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no data at {name!r}: no such file or folder here, and the hub does not give it ({reason}); {remedy}"
        ) from error
