"""Pairs of texts that contrastive learning brings together, and the candidates that it separates."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from src.modules.objectives.roles import pairs_sharing, same_texts, texts_of
from src.records import Triplet


@dataclass(frozen=True)
class Pairs:
    """B queries and N different documents.

    Attributes:
        queries: B texts.
        documents: N different texts.
        own: [B] int64, the place of each query's document among them.
        left_out: [B, N] bool, True on further documents that belong to the query and so are no negatives of it.
        false_negatives: pairs of instances that share a text, as query or as document, and so are no negatives of each other. A hard
            negative that is left out, or is embedded once with a text that equals it, is not counted.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    own: Tensor
    left_out: Tensor
    false_negatives: int

    @property
    def texts(self) -> list[str]:
        """Returns queries, then documents."""
        return [*self.queries, *self.documents]


def supervised(batch: Sequence[Triplet]) -> Pairs:
    """Pairs each query with its positive; all positives and hard negatives of the batch are candidates.

    A text that occurs several times (the hard negative of one instance is often the positive of another) is embedded once and is one
    candidate. Two kinds of documents are no negatives of a query: one that equals it, and the positive of another instance that shares a
    text with the query's (roles.same_texts), also where it is a hard negative as well.
    """
    documents = tuple(dict.fromkeys(texts_of(batch, "positive") + texts_of(batch, "negative")))
    place = {text: i for i, text in enumerate(documents)}
    own = torch.tensor([place[t.positive] for t in batch])
    left_out = torch.zeros(len(batch), len(documents), dtype=torch.bool)
    same = same_texts(batch, left_out.device)
    if same is not None:
        instances, others = same.nonzero(as_tuple=True)
        left_out[instances, own[others]] = True
    for row, triplet in zip(left_out, batch, strict=True):
        if triplet.query in place:
            row[place[triplet.query]] = True
    left_out[torch.arange(len(batch)), own] = False
    return Pairs(tuple(texts_of(batch, "query")), documents, own, left_out, pairs_sharing(same))


def dropout_twice(batch: Sequence[Triplet]) -> Pairs:
    """Pairs each text with itself (unsupervised SimCSE, Gao et al., arXiv 2104.08821): dropout makes two embeddings of it.

    The texts are the positives; one that occurs several times counts once.
    """
    counts = Counter(texts_of(batch, "positive"))
    texts, shared = tuple(counts), sum(comb(count, 2) for count in counts.values())
    return Pairs(texts, texts, torch.arange(len(texts)), torch.zeros(len(texts), len(texts), dtype=torch.bool), shared)


PAIRS: dict[str, Callable[[Sequence[Triplet]], Pairs]] = {"supervised": supervised, "dropout": dropout_twice}
"""By the name that `module.pairs` has."""
