"""Docstrings of installed packages as text pairs: the summary line is a query, the rest its document.

Files are parsed with `ast`, never imported, so nothing of a package runs and nothing it needs is needed here.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

STDLIB = "stdlib"
"""The name that stands for the standard library in a list of packages."""

_FORMAT = 1  # raise when the cleaning below changes, so that older caches are not read
_SKIPPED_DIRS = {"site-packages", "dist-packages", "tests", "test", "testing", "__pycache__", "idlelib", "lib2to3", "_vendor"}
_RULE = re.compile(r"^[-=~^*_]{3,}$")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Docstring:
    """A docstring in two parts.

    Attributes:
        id: qualified name, `package.module:Class.function`.
        package: top-level package, or `stdlib`.
        module: dotted module path.
        summary: first paragraph on one line, 4 to 25 words, at most 160 characters.
        body: what follows it on one line, at least 8 words, at most `max_chars` characters, cut between words.
    """

    id: str
    package: str
    module: str
    summary: str
    body: str


def package_root(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: it is not installed, or is a single file.
    """
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed as a folder of modules; remove it from the datamodule's packages or install it"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_version(package: str) -> str:
    """Version of the distribution that owns a package; Python's own for the standard library."""
    if package == STDLIB:
        return sys.version.split()[0]
    owners = _owners().get(package)
    return importlib.metadata.version(owners[0]) if owners else "unknown"


@functools.cache  # it reads the files of every distribution: seconds, where many are installed
def _owners() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def cut_between_words(text: str, max_chars: int) -> str:
    """The text, or as many of its whole words as fit."""
    return text if len(text) <= max_chars else text[:max_chars].rsplit(" ", 1)[0]


def split_docstring(text: str, max_chars: int) -> tuple[str, str] | None:
    """Summary and body of a docstring, or None where either is too short to be a query or a document.

    Doctest lines and underlines of headings are dropped: they are layout, not language.
    """
    head, _, rest = text.strip().partition("\n\n")
    lines = (line.strip() for line in rest.splitlines())
    rest = " ".join(line for line in lines if not line.startswith((">>>", "...")) and not _RULE.match(line))
    summary, body = _SPACE.sub(" ", head).strip(), cut_between_words(_SPACE.sub(" ", rest).strip(), max_chars)
    if not 4 <= len(summary.split()) <= 25 or len(summary) > 160 or len(body.split()) < 8:
        return None
    return summary, body


def _named_nodes(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield name, node
            yield from _named_nodes(node, f"{name}.")
        else:
            yield from _named_nodes(node, prefix)


def read_file(path: Path, package: str, module: str, max_chars: int) -> list[Docstring]:
    """The usable docstrings of one file; none where Python cannot parse it (templates, other dialects)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        log.debug("skipping %s: %s", path, error)
        return []
    found = []
    for name, node in [("", tree), *_named_nodes(tree)]:
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        parts = split_docstring(text, max_chars) if text else None
        if parts and all(part.isprintable() for part in parts):
            found.append(Docstring(f"{module}:{name}" if name else module, package, module, *parts))
    return found


def read_package(package: str, max_chars: int) -> list[Docstring]:
    """All usable docstrings of a package, in the order of its sorted file paths."""
    root = package_root(package)
    found: list[Docstring] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_DIRS)
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                dotted = ".".join((package, *(part for part in parts if part != "__init__")))
                found += read_file(path, package, dotted, max_chars)
    return found


def without_repeats(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """The first of those that share a summary or a body: a copy would be a false negative of its twin."""
    seen: set[str] = set()
    kept = []
    for doc in docstrings:
        keys = {doc.summary.lower(), doc.body.lower()}
        if not keys & seen:
            kept.append(doc)
        seen |= keys
    return kept


def collect(packages: Sequence[str], cache_dir: Path | str, max_chars: int = 600) -> list[Docstring]:
    """Docstrings of `packages`, without repeats, in a fixed order for fixed package versions.

    Parsed once by two processes and kept in `cache_dir` as JSON lines, under a name that changes with the versions.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    versions = {package: package_version(package) for package in packages}
    key = hashlib.sha256(json.dumps([_FORMAT, max_chars, versions]).encode()).hexdigest()[:16]
    cache = Path(cache_dir) / f"docstrings_{key}.jsonl"
    if cache.exists():
        return [Docstring(**json.loads(line)) for line in cache.read_text(encoding="utf-8").splitlines()]
    for package in packages:
        package_root(package)
    log.info("reading docstrings of %s (once; kept in %s)", ", ".join(packages), cache)
    with ProcessPoolExecutor(max_workers=2) as pool:
        found = [doc for docs in pool.map(read_package, packages, [max_chars] * len(packages)) for doc in docs]
    found = without_repeats(found)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.tmp")  # written aside: two runs may start at once
    partial.write_text("".join(json.dumps(asdict(doc)) + "\n" for doc in found), encoding="utf-8")
    partial.replace(cache)
    return found
