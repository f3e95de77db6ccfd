"""The records that the datamodules serve: plain text, checked once, with no idea of tokens or models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Triplet:
    """One supervised instance.

    Attributes:
        id: names the record in every error about it (file and line, or a qualified Python name).
        query, positive: non-empty texts.
        negatives: M >= 0 non-empty texts; every record of a batch has the same M.
        source: where it comes from (a data set, a package), for grouping and for reports.
    """

    id: str
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for field, text in (("query", self.query), ("positive", self.positive), *(("negative", n) for n in self.negatives)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"record {self.id!r}: {field} is empty; every text of a triplet needs at least one character")

    @property
    def texts(self) -> list[str]:
        """The different texts of the instance."""
        return list(dict.fromkeys((self.query, self.positive, *self.negatives)))
