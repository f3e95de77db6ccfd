"""Training records: plain text, checked once, independent of tokens and models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Triplet:
    """One training instance. Its texts have no white space around them, as in prompts: texts that a model reads alike are equal.

    Attributes:
        id: file and line, or a qualified Python name; errors name the record by it.
        query, positive: non-empty texts.
        negatives: M >= 0 non-empty texts; all records of a batch have the same M.
        source: a data set or a package, for grouping and reports.

    Raises:
        ValueError: a text is empty.
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
        stripped = {"query": self.query.strip(), "positive": self.positive.strip(), "negatives": tuple(n.strip() for n in self.negatives)}
        for field, texts in stripped.items():
            object.__setattr__(self, field, texts)

    @property
    def texts(self) -> list[str]:
        """The distinct texts."""
        return list(dict.fromkeys((self.query, self.positive, *self.negatives)))
