"""Where records lie: a file, a folder of files, or a data set on the hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
        """The name without its suffix."""
        return str(PurePosixPath(self.name).with_suffix(""))


def find_files(path: str, patterns: Sequence[str], revision: str | None = None) -> list[DataFile]:
    """The files that `path` stands for, sorted by name.

    Args:
        path: a file; a folder, whose files (and those of its subfolders) that match a pattern are taken; or else the name
            of a data set on the hub, of which the same files are downloaded once.
        patterns: like *.jsonl. A file that is named itself need not match.
        revision: on the hub.

    Raises:
        FileNotFoundError: nothing of that name, or no file in it that matches.
        ValueError: a link in the folder leads out of it.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [DataFile(local, local.name)]
    root = local if local.is_dir() else _download(path, patterns, revision)
    matching = {file.relative_to(root).as_posix() for pattern in patterns for file in root.rglob(pattern) if file.is_file()}
    names = sorted(name for name in matching if not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise FileNotFoundError(
            f"no file in {path!r} matches {' or '.join(patterns)}: give datamodule.path=<local file>, or datamodule.files"
        )
    return [DataFile(inside(root, name), name) for name in names]


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
