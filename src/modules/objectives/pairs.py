"""What belongs together in a batch, and what is to be told apart: the views of contrastive learning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.records import Triplet


@dataclass(frozen=True)
class Pairs:
    """B queries over N different documents.

    Attributes:
        queries: B texts.
        documents: N different texts.
        own: [B] int64, the place of each query's document among them.
        left_out: [B, N] bool, True on further documents that belong to the query, which are no negatives of it.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    own: Tensor
    left_out: Tensor

    @property
    def texts(self) -> list[str]:
        """Queries, then documents: what is embedded."""
        return [*self.queries, *self.documents]


def supervised(batch: Sequence[Triplet]) -> Pairs:
    """Each query with its positive, over all positives and hard negatives of the batch.

    A text that stands in a batch several times (the hard negative of one instance is often another's positive) is embedded
    once and is one candidate: a second copy of a query's own document could not be told from it. Nor is the positive of
    another instance with the same query a negative.
    """
    documents = tuple(dict.fromkeys([t.positive for t in batch] + [n for t in batch for n in t.negatives]))
    place = {text: i for i, text in enumerate(documents)}
    own = torch.tensor([place[t.positive] for t in batch])
    belong: dict[str, list[int]] = {}
    for triplet in batch:
        belong.setdefault(triplet.query, []).append(place[triplet.positive])
    left_out = torch.zeros(len(batch), len(documents), dtype=torch.bool)
    for row, triplet in zip(left_out, batch, strict=True):
        row[belong[triplet.query]] = True
    left_out[torch.arange(len(batch)), own] = False
    return Pairs(tuple(t.query for t in batch), documents, own, left_out)


def dropout_twice(batch: Sequence[Triplet]) -> Pairs:
    """Each text with itself, over the texts of the batch (unsupervised SimCSE, Gao et al., arXiv 2104.08821).

    What makes two embeddings of one text is the dropout of its two passes. The texts are the positives; one that stands in
    the batch several times counts once.
    """
    texts = tuple(dict.fromkeys(t.positive for t in batch))
    return Pairs(texts, texts, torch.arange(len(texts)), torch.zeros(len(texts), len(texts), dtype=torch.bool))


PAIRS: dict[str, Callable[[Sequence[Triplet]], Pairs]] = {"supervised": supervised, "dropout": dropout_twice}
"""By the name that `module.pairs` has."""
