"""InfoNCE and retrieval metrics of a batch. Pure functions on embeddings."""

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(queries: Tensor, documents: Tensor, own: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """Returns -log softmax_j(cos(q_i, d_j) / tau) at j = own[i], mean over i (van den Oord et al., arXiv 1807.03748, eq. 4).

    Args:
        queries: [B, D], not normalised.
        documents: [N, D], those of the batch and hard negatives alike.
        own: [B] int64, the document that belongs to each query.
        temperature: tau.
        left_out: [B, N] bool, True where a document is no candidate for a query.

    Returns:
        Scalar float32; similarities are computed in float32 under autocast too, as division by tau scales their rounding up.
    """
    return F.cross_entropy(cosines(queries, documents, left_out) / temperature, own)


def symmetric_info_nce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """Returns the mean of both directions for [B, D] queries and documents of which row i of one belongs to row i of the other."""
    own = torch.arange(len(queries), device=queries.device)
    return (info_nce(queries, documents, own, temperature) + info_nce(documents, queries, own, temperature)) / 2


def cosines(queries: Tensor, documents: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Returns [B, N] float32 cosines of [B, D] and [N, D]; -inf where `left_out`, [B, N] bool, is True."""
    with torch.autocast(queries.device.type, enabled=False):
        similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(documents.float(), dim=-1).T
    return similarity if left_out is None else similarity.masked_fill(left_out, -torch.inf)


def mean_reciprocal_rank(queries: Tensor, documents: Tensor) -> Tensor:
    """Returns a scalar, the mean of 1 / rank of document i for query i by cosine; queries and documents are [B, D]."""
    similarity = cosines(queries, documents)
    return (1.0 / (similarity >= similarity.diagonal().unsqueeze(1)).sum(dim=1)).mean()
