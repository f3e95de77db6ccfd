"""Describes the content of a data set when a run read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataContents:
    """A data set, as a datamodule's `contents()` tells of it.

    Attributes:
        name: short.
        source: path, name on the hub, or packages with their versions.
        digest: of the content; empty: not known.
        records: all there are; 0: not known.
        usable: those that can be trained on, held-out ones included; 0: not known.
    """

    name: str
    source: str
    digest: str
    records: int = 0
    usable: int = 0
