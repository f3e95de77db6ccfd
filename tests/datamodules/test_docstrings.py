import json
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.datamodules import docstrings
from src.datamodules.docstrings import (
    STDLIB,
    Docstring,
    collect,
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


def test_docstrings_are_found_by_their_qualified_names(package: str) -> None:
    found = read_file(package_root(package) / "io.py", package, "tablekit.io", max_chars=600)
    assert [doc.id for doc in found] == ["tablekit.io", "tablekit.io:Table", "tablekit.io:Table.total"]
    assert found[0].summary == "Reads and writes small tables of numbers."
    assert found[1].body.startswith("Rows are kept in the order")


def test_doctests_and_underlines_are_left_out(package: str) -> None:
    total = read_file(package_root(package) / "io.py", package, "tablekit.io", max_chars=600)[-1]
    assert total.body == "Notes Empty tables sum to zero, which is what most of the callers expect of them. 0"


def test_a_file_that_cannot_be_parsed_gives_none(package: str) -> None:
    assert read_file(package_root(package) / "broken.py", package, "tablekit.broken", max_chars=600) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Too short.\n\nBut the body that follows it is long enough to be a document.", "summary of two words"),
        ("A summary that stands alone with nothing after it.", "no body"),
        ("A summary of enough words.\n\nBody too short.", "body of three words"),
        ("word " * 26 + "\n\nThe body that follows it is long enough to be a document.", "summary of 26 words"),
        ("word " * 3 + "x" * 160 + "\n\nThe body that follows it is long enough to be a document.", "summary of 175 characters"),
    ],
)
def test_a_docstring_that_makes_no_pair_is_left_out(text: str, why: str) -> None:
    assert split_docstring(text, 600) is None, why


def test_a_long_body_is_cut_between_words() -> None:
    parts = split_docstring("A summary of\n  enough words.\n\n" + "alphabet " * 40, max_chars=100)
    assert parts == ("A summary of enough words.", " ".join(["alphabet"] * 11))


def test_the_first_of_two_copies_is_kept() -> None:
    docs = [
        Docstring("a", "p", "m", "Same summary", "first body"),
        Docstring("b", "p", "m", "same SUMMARY", "second body"),
        Docstring("c", "p", "m", "Another summary", "First body"),
        Docstring("d", "p", "m", "A third summary", "a third body"),
    ]
    assert [doc.id for doc in without_repeats(docs)] == ["a", "d"]


def test_collecting_skips_tests_and_repeats_and_keeps_a_cache(package: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = collect([package], cache)
    assert [doc.id for doc in first] == ["tablekit.io", "tablekit.io:Table", "tablekit.io:Table.total"]
    (file,) = cache.iterdir()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [doc.id for doc in first]
    (tmp_path / package / "io.py").write_text("")  # what is cached is not read again
    assert collect([package], cache) == first


def test_the_cache_follows_versions_and_lengths(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect([package], tmp_path / "cache")
    collect([package], tmp_path / "cache", max_chars=80)
    monkeypatch.setattr(docstrings, "package_version", lambda package: "another")
    collect([package], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_real_package_gives_the_same_clean_pairs_every_time(tmp_path: Path) -> None:
    docs = collect(["rich"], tmp_path / "a")
    assert docs == collect(["rich"], tmp_path / "b")
    assert len(docs) > 100
    assert len({doc.summary.lower() for doc in docs}) == len({doc.body.lower() for doc in docs}) == len(docs)
    for doc in docs:
        assert doc.package == "rich"
        assert doc.module.split(".")[0] == "rich"
        assert 4 <= len(doc.summary.split()) <= 25
        assert len(doc.summary) <= 160
        assert len(doc.body.split()) >= 8
        assert len(doc.body) <= 600


def test_an_absent_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="package 'nosuchpackage' is not installed"):
        collect(["nosuchpackage"], tmp_path)


def test_the_standard_library_is_a_package_of_its_own() -> None:
    assert (package_root(STDLIB) / "argparse.py").is_file()
    assert package_version(STDLIB).startswith("3.")


def test_every_package_of_the_corpus_is_pinned_and_installed_at_its_pin() -> None:
    """Another version is another data set: `pip install .` alone decides what is read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in project["dependencies"] if "==" in line)
    owners = packages_distributions()
    named: set[str] = set()
    for file in (ROOT / "configs" / "packages").glob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(config, dict)
        named |= {package for packages in config.values() for package in packages}
    assert named
    for package in sorted(named - {STDLIB}):
        pinned = {name for name in {n.lower() for n in owners[package]} if name in pins}
        assert pinned, f"{package} (of {owners[package]}) is read by a datamodule and pinned nowhere in pyproject.toml"
        for name in pinned:
            assert version(name).split("+")[0] == pins[name]
