"""Reads docstrings of installed packages as pairs of a query (the summary) and a document (the rest).

Files are parsed with `ast` and never imported, so no code of a package runs.
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

from src.utils.atomic import write_atomic

log = logging.getLogger(__name__)

STDLIB = "stdlib"
"""Stands for the standard library in a list of packages."""

_FORMAT = 1  # raise when the cleaning below changes, so that older caches are not used
_SKIPPED_DIRS = {"site-packages", "dist-packages", "tests", "test", "testing", "__pycache__", "idlelib", "lib2to3", "_vendor"}
_RULE = re.compile(r"^[-=~^*_]{3,}$")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Docstring:
    """A docstring in two parts.

    Attributes:
        id: qualified name, `package.module:Class.function`.
        package: top-level package, or STDLIB.
        module: dotted path.
        summary: first paragraph on one line, 4 to 25 words and at most 160 characters.
        body: the rest on one line, at least 8 words, cut between words.
    """

    id: str
    package: str
    module: str
    summary: str
    body: str


def package_root(package: str) -> Path:
    """Returns the folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed, or is a single file.
    """
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {package!r} is not installed as a folder of modules: install it, or remove it from the datamodule's packages"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_version(package: str) -> str:
    """Returns the version of the distribution that owns a package; for the standard library, Python's."""
    if package == STDLIB:
        return sys.version.split()[0]
    owners = _owners().get(package)
    return importlib.metadata.version(owners[0]) if owners else "unknown"


@functools.cache  # reads files of every distribution, which takes seconds
def _owners() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def cut_between_words(text: str, max_chars: int) -> str:
    """Returns the text, or as many of its first words as fit."""
    return text if len(text) <= max_chars else text[:max_chars].rsplit(" ", 1)[0]


def split_docstring(text: str, max_chars: int) -> tuple[str, str] | None:
    """Returns summary and body of a docstring, or None if either is too short (see Docstring) or the summary too long.

    Doctest lines and underlines of headings are dropped.
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
    """Returns the usable docstrings of one file; none if Python cannot parse it (a template, an older Python)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
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
    """Returns all usable docstrings of a package, in the order of its sorted file paths."""
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
    """Keeps the first of docstrings that share a summary or a body: the others would be false negatives."""
    seen: set[str] = set()
    kept = []
    for doc in docstrings:
        keys = {doc.summary.lower(), doc.body.lower()}
        if not keys & seen:
            kept.append(doc)
        seen |= keys
    return kept


def collect(packages: Sequence[str], cache_dir: Path | str, max_chars: int = 600) -> list[Docstring]:
    """Returns the docstrings of `packages` without repeats; versions of the packages determine texts and order.

    They are parsed once, and kept in `cache_dir` as JSON lines under a name that depends on the versions.

    Args:
        max_chars: longest body, cut between words.

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
    write_atomic(cache, "".join(json.dumps(asdict(doc)) + "\n" for doc in found))
    return found


def docstring_sentences(packages: Sequence[str], cache_dir: str, max_text_chars: int = 320) -> str:
    """Returns the path of a file with the body of a docstring on each line, which serves as unsupervised data.

    Args:
        packages, cache_dir: see `collect`. The file is kept in `cache_dir`, named by its content.
        max_text_chars: longest line, cut between words.
    """
    lines = "".join(cut_between_words(doc.body, max_text_chars) + "\n" for doc in collect(packages, cache_dir))
    file = Path(cache_dir) / f"docstring_sentences_{hashlib.sha256(lines.encode()).hexdigest()[:16]}.txt"
    if not file.exists():
        write_atomic(file, lines)
    return str(file)
