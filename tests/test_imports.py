"""The direction of imports: each room imports rooms below it, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

LEVELS = [
    {"src.records", "src.utils"},
    {"src.modules.prompt"},
    {"src.modules.types"},
    {"src.modules.objectives", "src.modules.policy"},
    {"src.modules.rollouts", "src.datamodules"},
    {"src.modules.encoder", "src.modules.plan"},
    {"src.modules.distributed"},
    {"src.modules.training"},
    {"src.modules.policy_module"},
    {"src.modules.grace", "src.modules.contrastive"},
    {"src.evaluation", "src.doctor"},
    {"src.callbacks"},
]
"""Rooms from the lowest to the highest; those of one level do not know each other."""


def imports_of(file: Path) -> set[str]:
    """Reads the modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_of(file).rsplit(".", node.level)[0] + "." if node.level else ""
            name = package + (node.module or "")
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


FILES = [file for file in sorted((ROOT / "src").rglob("*.py")) if file.name != "__init__.py"]
MODULES = {module_of(file) for file in FILES}


def room_of(module: str) -> tuple[int, str]:
    """Finds the level and the room of a module."""
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return level, room
    raise AssertionError(f"{module} is in no room: name it in LEVELS")


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_run_down(file: Path) -> None:
    level, room = room_of(module_of(file))
    upward = [name for name in imports_of(file) if room_of(name)[1] != room and room_of(name)[0] >= level]
    assert not upward, f"{module_of(file)} imports {upward}"


def test_no_circles() -> None:
    TopologicalSorter({module_of(file): imports_of(file) for file in FILES}).prepare()  # raises CycleError


@pytest.mark.parametrize("entry", ["train.py", "evaluate.py", "mteb_data.py"])
def test_nothing_imports_an_entry(entry: str) -> None:
    name = entry.removesuffix(".py")
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.ImportFrom) and node.module == name for node in ast.walk(tree)), file
