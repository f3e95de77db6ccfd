"""Names the column of each role: by setting, or recognised by the names that other projects give them."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

RECOGNISED = {
    "query": ("query", "anchor", "sent0"),
    "positive": ("positive", "pos", "sent1"),
    "negative": ("negative", "neg", "hard_neg"),
    "source": ("source",),
    "text": ("text", "sentence"),
}
"""Names of columns by role. A negative may be several columns, numbered: negative_1, negative_2."""

_PROJECTS = {"anchor": "sentence-transformers", "pos": "FlagEmbedding", "sent0": "SimCSE"}

Given = tuple[tuple[str, tuple[str, ...]], ...]
"""Names by role, as the setting has them. Hashable, and its `repr` is always the same."""

Roles = Mapping[str, tuple[str, ...]]
"""The columns of each role that has some."""


def given_columns(columns: Mapping[str, Any], roles: Sequence[str]) -> Given:
    """Returns the setting `datamodule.columns` in its plain form; null is left out.

    Raises:
        ValueError: a role that is not among `roles`, a value that is no name, or several columns for a role other than negative.
    """
    unknown = [role for role in columns if role not in roles]
    if unknown:
        raise ValueError(f"datamodule.columns.{unknown[0]}: columns are named for {', '.join(roles)}")
    for role, name in columns.items():
        names = name if isinstance(name, Sequence) else [name]
        if name is not None and not all(isinstance(one, str) for one in names):
            raise ValueError(f"datamodule.columns.{role}={name!r}: it is the name of a column, in quotes if it is a number")
    given = {role: (name,) if isinstance(name, str) else tuple(name) for role, name in columns.items() if name is not None}
    several = [role for role, names in given.items() if role != "negative" and len(names) != 1]
    if several:
        raise ValueError(f"datamodule.columns.{several[0]}={list(given[several[0]])}: it is one column; negative alone may be several")
    return tuple(sorted(given.items()))


@functools.lru_cache(maxsize=1024)
def roles_of(names: tuple[str, ...], given: Given, roles: tuple[str, ...]) -> Roles:
    """Returns the columns of each role among a file's `names`: those given, all of which must be there, else those recognised."""
    chosen = dict(given)
    found = {role: chosen[role] if role in chosen else _recognised(names, role) for role in roles}
    return {role: columns for role, columns in found.items() if columns and set(columns) <= set(names)}


def _recognised(names: Iterable[str], role: str) -> tuple[str, ...]:
    for known in RECOGNISED[role]:
        if known in names:
            return (known,)
        if role == "negative" and (numbered := [name for name in names if re.fullmatch(rf"{known}_?\d+", name)]):
            return tuple(sorted(numbered, key=lambda name: int(re.sub(r"\D", "", name))))
    return ()


def in_words(found: Roles) -> str:
    """Returns the columns of each role on one line, with the project whose names they are."""
    project = next((f" (names of {_PROJECTS[names[0]]})" for names in found.values() if names[0] in _PROJECTS), "")
    return ", ".join(f"{role}={names[0] if len(names) == 1 else list(names)}" for role, names in found.items()) + project
