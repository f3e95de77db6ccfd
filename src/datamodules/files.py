"""Finds the files of a data set: a file, a pattern, a folder, a data set on the hub, or several of these."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from itertools import takewhile
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

from src.utils.plain_errors import HUB_ERRORS, reason

log = logging.getLogger(__name__)

_HUB = "hf://datasets/"
_HUB_PATH = re.compile(r"(?P<hub>hf://datasets/)?(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.+))?")
_TRAIN = re.compile(r"(?:^|[^a-z])train(?:[^a-z]|$)", re.IGNORECASE)
_OTHER_SPLIT = re.compile(r"(?:^|[^a-z])(?:test|dev|val|valid|validation|eval)(?:[^a-z]|$)", re.IGNORECASE)
_SHARD = re.compile(r"[-_./]?\d+-of-\d+$")  # of train-00000-of-00005
_HIDDEN = re.compile(r"(^|/)\.")
_UNREADABLE = (".zst", ".bz2", ".xz", ".zip")
_COMPRESSED = (".gz", *_UNREADABLE)


@dataclass(frozen=True)
class DataFile:
    """A file of records.

    Attributes:
        path: where it lies.
        name: its path inside the data folder. A record's id is this name and a line number.
    """

    path: Path
    name: str

    @property
    def format(self) -> str:
        """The suffix without its dot, of a .gz file the one before: jsonl, csv, tsv, parquet, ..."""
        return PurePosixPath(self.name.removesuffix(".gz")).suffix.removeprefix(".").lower()

    @property
    def stem(self) -> str:
        """The name without suffixes and without a shard number (train-00000-of-00005)."""
        stem = _without_suffix(self.name.removesuffix(".gz"))
        return _SHARD.sub("", stem) or stem


def find_files(path: str | Sequence[str], patterns: Sequence[str], revision: str | None = None) -> list[DataFile]:
    """Returns the files that `path` stands for, those of a folder sorted by name.

    Args:
        path: a file; a pattern of files, with * or **; a folder, searched with its subfolders; the name of a data set on the hub, or a
            folder, file or pattern of one (hf://datasets/<owner>/<name>[@<revision>]/<folder>), downloaded once; or a list of these.
        patterns: names to take from a folder or data set, such as *.jsonl. Of one with files for training, those that are named for
            validation or test are left out.
        revision: of a data set on the hub.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no file that matches.
        ValueError: the folder has links to data outside of it; or a compressed file that no pattern names; or a file both
            compressed and not.
    """
    found = [file for one in ([path] if isinstance(path, str) else path) for file in _files_of(str(one), patterns, revision)]
    names = Counter(file.name for file in found)
    distinct = {file.path: file if names[file.name] == 1 else replace(file, name=file.path.as_posix()) for file in found}
    return list(distinct.values())


def _files_of(path: str, patterns: Sequence[str], revision: str | None) -> list[DataFile]:
    """Returns the files of one path, see `find_files`."""
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix in _UNREADABLE:
            raise ValueError(f"{path!r} is compressed in a way that is not read here: decompress it, or compress it as .gz")
        return [DataFile(local, local.name)]
    if local.is_dir():
        _refuse_outer_links(local, patterns)
        return _in_folder(local, path, patterns, is_local=True)
    if has_magic(path) and not path.startswith(_HUB):
        fixed = list(takewhile(lambda part: not has_magic(part), local.parts[:-1]))
        root, rest = Path(*fixed), str(Path(*local.parts[len(fixed) :]))
        names = sorted(file.relative_to(root).as_posix() for file in root.glob(rest) if file.is_file())
        if not names:
            raise FileNotFoundError(f"no file matches datamodule.path={path!r}")
        _refuse_twice(path, names)
        return [DataFile(inside(root, name), name) for name in names]
    snapshot, inner = _download(path, patterns, revision)
    if (snapshot / inner).is_dir():
        return _in_folder(snapshot / inner, path, patterns, is_local=False)
    return _in_folder(snapshot, path, [inner], is_local=False)


def _in_folder(root: Path, path: str, patterns: Sequence[str], is_local: bool) -> list[DataFile]:
    """Returns the files of a folder that match; `path` is what the user calls it."""
    names = _matching(root, patterns)
    others = sorted(set(_matching(root, ["*"])) - set(names)) if is_local else []  # of a download, only matching files matter
    unread = [n for n in others if n.endswith(_COMPRESSED) and _fits(_without_suffix(n), patterns) and _without_suffix(n) not in names]
    if unread:
        raise ValueError(
            f"{path!r} holds {_few(unread)}, which {' or '.join(patterns)} leaves out: decompress them, add .gz files to "
            "datamodule.files, or move them elsewhere"
        )
    _refuse_twice(path, names)
    json_files = [name for name in others if name.endswith(".json") and _fits(f"{name}l", patterns)]
    if not names:
        found = f" (there is {_few(json_files)})" if json_files else ""
        raise FileNotFoundError(
            f"no file in {path!r} matches {' or '.join(patterns)}{found}: give datamodule.path=<local file>, or datamodule.files"
        )
    if json_files:
        log.warning("%s are not read: if they hold one record a line, add them to datamodule.files", _few(json_files))
    return [DataFile(inside(root, name), name) for name in _of_training(names, patterns)]


def _refuse_twice(path: str, names: Sequence[str]) -> None:
    """Raises ValueError for a file that is there both plain and compressed."""
    twice = [name for name in names if any(name + suffix in names for suffix in _COMPRESSED)]
    if twice:
        raise ValueError(f"{path!r} holds {_few(twice)} both plain and compressed: move one of the two elsewhere")


def _of_training(names: list[str], patterns: Sequence[str]) -> list[str]:
    """Leaves out files of other splits, if there are files of the training split and no pattern asks for others."""
    if not any(_TRAIN.search(name) for name in names) or any(_OTHER_SPLIT.search(pattern) for pattern in patterns):
        return names
    left_out = [name for name in names if _OTHER_SPLIT.search(name) and not _TRAIN.search(name)]
    if left_out:
        log.warning(
            "%s are not trained on, as their names say validation or test: name them in datamodule.files to read them", _few(left_out)
        )
    return [name for name in names if name not in left_out]


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _matching(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names in a folder and its subfolders, sorted, without hidden ones."""
    names = {file.relative_to(root).as_posix() for pattern in patterns for file in root.rglob(pattern) if file.is_file()}
    return sorted(name for name in names if not _HIDDEN.search(name))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in patterns)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse_outer_links(root: Path, patterns: Sequence[str]) -> None:
    """Raises ValueError for a link to an outside folder with matching files, which `rglob` does not follow."""
    for folder, names, _ in os.walk(root):
        for link in (Path(folder, name) for name in sorted(names)):
            name = link.relative_to(root).as_posix()
            outside = link.is_symlink() and not link.resolve().is_relative_to(root.resolve())
            if outside and not _HIDDEN.search(name) and _matching(link, patterns):
                raise ValueError(f"{str(root)!r} has a link to a folder outside of it ({name}): copy it there, or give it as the path")


def inside(folder: Path | str, name: str) -> Path:
    """Returns the path of a file or folder whose name came with the data.

    Links inside the folder are followed, and so are those from a snapshot in the hub's cache to its blobs.

    Raises:
        ValueError: it lies outside the folder (`../secrets`, `/etc/passwd`, a link to one of them).
    """
    root, path = Path(folder).resolve(), Path(folder, name)
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(home) for home in allowed):
        raise ValueError(f"{name!r} leads out of {str(folder)!r}, and data is read from its folder alone: name the file, or copy it there")
    return path


def hub_name(path: str) -> str | None:
    """Returns the data set of the hub that a path stands for, owner/name; None of anything else."""
    match = _HUB_PATH.fullmatch(path)
    if match is None or (match["inner"] and not match["hub"]) or Path(path).exists():
        return None
    return match["name"]


def _download(path: str, patterns: Sequence[str], revision: str | None) -> tuple[Path, str]:
    """Returns the folder of a data set of the hub, and the folder, file or pattern inside that `path` names ("" for all of it)."""
    name, match = hub_name(path), _HUB_PATH.fullmatch(path)
    if name is None or match is None:
        raise FileNotFoundError(f"no data at {path!r}: no such file or folder; give datamodule.path=<local file or folder>")
    inner = (match["inner"] or "").rstrip("/")
    wanted = [inner, *(f"{inner}/{pattern}" for pattern in patterns)] if inner else list(patterns)
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=match["revision"] or revision, allow_patterns=wanted)), inner
    except HUB_ERRORS as error:
        part = f" --include '{inner}*'" if inner else ""
        raise FileNotFoundError(
            f"no data at {path!r}: no such file or folder, and none from the hub ({reason(error)}); where the hub is in reach, "
            f"`hf download {name} --repo-type dataset{part} --local-dir {name.split('/')[1]}`, copy that folder here, and "
            "give datamodule.path=<local file or folder>"
        ) from error
