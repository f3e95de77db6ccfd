"""Docstrings of installed packages as queries and documents."""

import contextlib
import json
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from src.datamodules import docstrings
from src.datamodules.docstring_datamodule import DocstringDataModule
from src.datamodules.docstrings import (
    STDLIB,
    Docstring,
    collect,
    docstring_sentences,
    package_root,
    package_version,
    read_file,
    split_docstring,
    without_repeats,
)

ROOT = Path(__file__).parents[2]

SOURCE = '''
"""Reads and writes small tables of numbers.

A table is a file of rows; every row holds as many numbers as the first one does.
"""

raise RuntimeError("this file must be parsed, never run")


class Table:
    """Holds the rows of one file in memory.

    Rows are kept in the order in which they were read, and none of them is ever copied.
    """

    def total(self):
        """Sums all numbers of all the rows.

        Notes
        -----
        Empty tables sum to zero, which is what most of the callers expect of them.

        >>> Table().total()
        0
        """

        async def inner():
            """Short one."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of three files on sys.path; one is a test, one cannot be parsed."""
    root = tmp_path / "tablekit"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "io.py").write_text(SOURCE)
    (root / "broken.py").write_text("def (:\n")
    (root / "tests" / "test_io.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tablekit"


BODY = "The body that follows it is long enough to be a document."
IDS = ["tablekit.io", "tablekit.io:Table", "tablekit.io:Table.total"]


def test_file(package):
    found = read_file(package_root(package) / "io.py", package, "tablekit.io", max_chars=600)
    assert [doc.id for doc in found] == IDS
    assert found[0].summary == "Reads and writes small tables of numbers."
    assert found[1].body.startswith("Rows are kept in the order")
    # without doctest and underline
    assert found[2].body == "Notes Empty tables sum to zero, which is what most of the callers expect of them. 0"
    assert read_file(package_root(package) / "broken.py", package, "tablekit.broken", max_chars=600) == []


@pytest.mark.parametrize(
    "text",
    [
        f"Too short.\n\n{BODY}",
        "A summary that stands alone with nothing after it.",
        "A summary of enough words.\n\nBody too short.",
        f"{'word ' * 26}\n\n{BODY}",
        f"{'word ' * 3}{'x' * 160}\n\n{BODY}",
    ],
    ids=["summary of two words", "no body", "body of three words", "summary of 26 words", "summary of 175 characters"],
)
def test_unusable_docstring(text):
    assert split_docstring(text, 600) is None


def test_long_body_is_cut_between_words():
    parts = split_docstring("A summary of\n  enough words.\n\n" + "alphabet " * 40, max_chars=100)
    assert parts == ("A summary of enough words.", " ".join(["alphabet"] * 11))


def test_first_of_two_copies_is_kept():
    texts = {"a": ("Same summary", "first body"), "b": ("same SUMMARY", "second"), "c": ("Another", "First body"), "d": ("Third", "third")}
    assert [doc.id for doc in without_repeats(Docstring(id, "p", "m", *text) for id, text in texts.items())] == ["a", "d"]


def test_collect_keeps_a_cache(package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = collect([package], cache)
    assert [doc.id for doc in first] == IDS  # neither tests nor repeats
    (file,) = cache.iterdir()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == IDS
    (tmp_path / package / "io.py").write_text("")
    assert collect([package], cache) == first
    collect([package], cache, max_chars=80)
    monkeypatch.setattr(docstrings, "package_version", lambda package: "another")
    collect([package], cache)
    assert len(list(cache.iterdir())) == 3


def test_sentences_are_bodies(package, tmp_path):
    file = docstring_sentences([package], str(tmp_path / "cache"), max_text_chars=40)
    assert docstring_sentences([package], str(tmp_path / "cache"), max_text_chars=40) == file
    lines = Path(file).read_text().splitlines()
    assert [doc.body.startswith(line) and len(line) <= 40 for doc, line in zip(collect([package], tmp_path), lines, strict=True)] == [
        True
    ] * 3


def test_real_package(tmp_path):
    docs = collect(["rich"], tmp_path / "a")
    assert docs == collect(["rich"], tmp_path / "b")
    assert len(docs) > 100
    assert len({doc.summary.lower() for doc in docs}) == len({doc.body.lower() for doc in docs}) == len(docs)
    for doc in docs:
        assert doc.package == doc.module.split(".")[0] == "rich"
        assert 4 <= len(doc.summary.split()) <= 25
        assert len(doc.summary) <= 160
        assert len(doc.body.split()) >= 8
        assert len(doc.body) <= 600


def test_absent_package(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="'nosuchpackage' is not installed"):
        collect(["nosuchpackage"], tmp_path)


def test_standard_library():
    assert (package_root(STDLIB) / "argparse.py").is_file()
    assert package_version(STDLIB).startswith("3.")


def test_packages_are_installed_at_their_pins():
    """Another version is another data set: constraints.txt decides what is read, and the dependencies of pyproject.toml bring it."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    owners, brought = (
        packages_distributions(),
        requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]),
    )
    named = set()
    for file in (ROOT / "configs" / "packages").glob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(config, dict)
        named |= {package for packages in config.values() for package in packages}
    assert named
    for package in sorted(named - {STDLIB}):
        pinned = {name for name in {n.lower() for n in owners[package]} if name in pins}
        assert pinned, f"{package} (of {owners[package]}) is read by a datamodule and pinned nowhere in constraints.txt"
        assert {name.replace("_", "-") for name in pinned} <= brought, f"{package} comes with no dependency of pyproject.toml"
        for name in pinned:
            assert version(name).split("+")[0] == pins[name]


def requirements(lines: list[str]) -> set[str]:
    """Returns all distributions that requirements bring, directly or not."""
    brought: set[str] = set()
    waiting = [(Requirement(line), "") for line in lines]
    while waiting:
        needed, extra = waiting.pop()
        name = needed.name.lower().replace("_", "-")
        if name in brought or (needed.marker and not needed.marker.evaluate({"extra": extra})):
            continue
        brought.add(name)
        with contextlib.suppress(PackageNotFoundError):  # one that only a machine of another kind has
            waiting += [(Requirement(line), wanted) for wanted in ("", *needed.extras) for line in requires(name) or []]
    return brought


def test_batch_size_is_modules_times_docstrings() -> None:
    data = DocstringDataModule(["rich"], ["networkx"], ["mteb"], "unused", modules_per_batch=3, docstrings_per_module=4)
    assert data.batch_size == 12
