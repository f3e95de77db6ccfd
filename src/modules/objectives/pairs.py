"""Pairs of texts that contrastive learning brings together, and the candidates that it separates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.records import Triplet


@dataclass(frozen=True)
class Pairs:
    """B queries and N different documents.

    Attributes:
        queries: B texts.
        documents: N different texts.
        own: [B] int64, the place of each query's document among them.
        left_out: [B, N] bool, True on further documents that belong to the query and so are no negatives of it.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    own: Tensor
    left_out: Tensor

    @property
    def texts(self) -> list[str]:
        """Returns queries, then documents."""
        return [*self.queries, *self.documents]


def supervised(batch: Sequence[Triplet]) -> Pairs:
    """Pairs each query with its positive; all positives and hard negatives of the batch are candidates.

    A text that occurs several times (the hard negative of one instance is often the positive of another) is embedded once and is one
    candidate. The positive of another instance with the same query is not a negative.
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
    """Pairs each text with itself (unsupervised SimCSE, Gao et al., arXiv 2104.08821): dropout makes two embeddings of it.

    The texts are the positives; one that occurs several times counts once.
    """
    texts = tuple(dict.fromkeys(t.positive for t in batch))
    return Pairs(texts, texts, torch.arange(len(texts)), torch.zeros(len(texts), len(texts), dtype=torch.bool))


PAIRS: dict[str, Callable[[Sequence[Triplet]], Pairs]] = {"supervised": supervised, "dropout": dropout_twice}
"""By the name that `module.pairs` has."""
