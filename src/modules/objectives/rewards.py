"""Contrastive rewards: how well a document's rationale placed the document, as numbers [B, K].

B instances, K rollouts of each positive, M negatives an instance, D hidden size. Equations from GRACE (Sun et al.,
arXiv 2510.04506, section 3), but for the forms that are this project's own, which say so. To try a reward of your own,
write one more function here with the same first argument and result, and one YAML that names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of one global batch.

    Attributes:
        query: [B, D] float32, one rollout each.
        positive: [B, K, D] float32.
        negative: [B, M, D] float32, M >= 0, one rollout each.
    """

    query: Tensor
    positive: Tensor
    negative: Tensor

    @classmethod
    def normalised(cls, query: Tensor, positive: Tensor, negative: Tensor) -> "Embeddings":
        """The same from pooled hidden states of any length."""
        return cls(*(F.normalize(x, dim=-1) for x in (query, positive, negative)))


@dataclass(frozen=True)
class Reward:
    """What each rollout earned, and for what.

    Attributes:
        terms: each term by name, [B, K] float32, before weighting.
        weights: of each term in the total; a term of weight 0 is only looked at.
        total: [B, K] float32, the weighted sum on the scale that the policy gradient sees.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    total: Tensor


RewardFunction = Callable[[Embeddings], Reward]
"""Unit vectors of a batch -> what its B x K rollouts earned."""


def without_autocast(reward: RewardFunction) -> RewardFunction:
    """The same reward in float32 under autocast too: products in bfloat16 would round away most of what a group's rollouts differ by."""
    return partial(_in_float32, reward)


def _in_float32(reward: RewardFunction, e: Embeddings) -> Reward:
    with torch.autocast(e.positive.device.type, enabled=False):
        return reward(e)


def combine(terms: dict[str, Tensor], weights: dict[str, float], scale: float = 1.0) -> Reward:
    """The weighted sum of the terms, times `scale`."""
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum(dim=0) * scale
    return Reward(terms, weights, total)


def consistency(positive: Tensor) -> Tensor:
    """[B, K]: mean similarity of a rollout to the others of its group; 0 where K = 1. `positive` is [B, K, D]."""
    k = positive.shape[1]
    if k == 1:
        return positive.new_zeros(positive.shape[:2])
    similarity = positive @ positive.transpose(1, 2)  # [B, K, K]
    return (similarity.sum(dim=2) - similarity.diagonal(dim1=1, dim2=2)) / (k - 1)


def _to_queries(e: Embeddings) -> Tensor:
    """[B, K, B]: similarity of rollout k of instance i to the query of instance j."""
    return torch.einsum("ikd,jd->ikj", e.positive, e.query)


def _own(similarity: Tensor) -> Tensor:
    """[B, n]: the entries j = i of a [B, n, B] tensor."""
    return similarity.diagonal(dim1=0, dim2=2).T


def _others(b: int, device: torch.device) -> Tensor:
    """[B, B] bool, True off the diagonal."""
    return ~torch.eye(b, dtype=torch.bool, device=device)


def _mean_of_others(similarity: Tensor) -> Tensor:
    """[B, n]: mean over j != i of a [B, n, B] tensor; 0 where B = 1."""
    b = similarity.shape[2]
    others = _others(b, similarity.device).unsqueeze(1)
    return (similarity * others).sum(dim=2) / max(b - 1, 1)


def paper(e: Embeddings, *, consistency_weight: float = 0.2, hard_weight: float = 0.2, temperature: float = 0.1) -> Reward:
    """The published reward.

    positive = sim(h_q, h_p[k]); negative = -sum_m sim(h_q, h_n[m]); consistency as above;
    hard = -1/(B-1) sum_{j != i} max_l sim(h_q[i], h_p[j, l]) (0 where B = 1);
    total = (positive + negative + lambda1 consistency + lambda2 hard) / temperature.

    `negative` and `hard` are the same number for all K rollouts of an instance: a group baseline removes them.
    """
    b, k = e.positive.shape[:2]
    cross = torch.einsum("id,jld->ijl", e.query, e.positive).max(dim=2).values  # [B, B]
    hard = -(cross * _others(b, cross.device)).sum(dim=1) / max(b - 1, 1)
    terms = {
        "positive": torch.einsum("id,ikd->ik", e.query, e.positive),
        "negative": -torch.einsum("id,imd->i", e.query, e.negative).unsqueeze(1).expand(b, k),
        "consistency": consistency(e.positive),
        "hard": hard.unsqueeze(1).expand(b, k),
    }
    weights = {"positive": 1.0, "negative": 1.0, "consistency": consistency_weight, "hard": hard_weight}
    return combine(terms, weights, 1 / temperature)


def document(
    e: Embeddings,
    *,
    consistency_weight: float = 0.2,
    hard_weight: float = 0.2,
    temperature: float = 0.1,
    hard_reduction: Literal["mean", "max"] = "mean",
) -> Reward:
    """The published reward with both negative terms moved to the document's side, so that each depends on the rollout.

    negative = -sum_m sim(h_p[k], h_n[m]); hard = -mean (or max) over j != i of sim(h_p[k], h_q[j]) (0 where B = 1);
    the rest as in `paper`. The unsupervised code of the GRACE authors uses the mean.
    """
    if hard_reduction not in ("mean", "max"):
        raise ValueError(f"reward.hard_reduction={hard_reduction!r}: it is mean or max")
    b = len(e.query)
    similarity = _to_queries(e)
    if hard_reduction == "mean" or b == 1:
        in_batch = -_mean_of_others(similarity)
    else:
        others = _others(b, similarity.device).unsqueeze(1)  # [B, 1, B]
        in_batch = -similarity.masked_fill(~others, -torch.inf).max(dim=2).values
    terms = {
        "positive": _own(similarity),
        "negative": -torch.einsum("ikd,imd->ik", e.positive, e.negative),
        "consistency": consistency(e.positive),
        "hard": in_batch,
    }
    weights = {"positive": 1.0, "negative": 1.0, "consistency": consistency_weight, "hard": hard_weight}
    return combine(terms, weights, 1 / temperature)


def unsupervised(e: Embeddings, *, consistency_weight: float = 0.2, hard_weight: float = 0.2, temperature: float = 0.1) -> Reward:
    """The published reward where an instance is one text: the anchor, another rollout of it, stands in the query's place.

    self = sim(anchor, h_p[k]); consistency as above; in_batch = -mean over j != i of sim(h_p[k], anchor[j]) (0 where B = 1);
    total = (self + lambda1 consistency + lambda2 in_batch) / temperature.

    Raises:
        ValueError: there are negatives, which this form has no place for.
    """
    if e.negative.shape[1]:
        raise ValueError("reward=unsupervised has no term for negatives: use reward=document, or a datamodule of texts (datamodule=wiki1m)")
    similarity = _to_queries(e)
    terms = {"self": _own(similarity), "consistency": consistency(e.positive), "in_batch": -_mean_of_others(similarity)}
    weights = {"self": 1.0, "consistency": consistency_weight, "in_batch": hard_weight}
    return combine(terms, weights, 1 / temperature)


def listwise(
    e: Embeddings,
    *,
    to_query_weight: float = 1.0,
    to_document_weight: float = 1.0,
    consistency_weight: float = 0.0,
    temperature: float = 0.05,
    centre: Literal["none", "document", "both"] = "both",
) -> Reward:
    """This project's reward: the log-probability that texts find their own among the batch's (InfoNCE as a reward).

    With s[j] a document's similarity to query j over tau:

    to_query = log softmax_j(s of h_p[i,k])[i]: the rollout finds its query.
    to_document = log of exp(s[i] of h_p[i,k]) over itself + sum_m exp(s[i] of h_n[i,m])
        + sum_{j != i} exp(mean_l s[i] of h_p[j,l]): the query finds the rollout.

    A shift common to all similarities cancels, so a rationale that pulls every text together earns nothing. A rollout that
    comes closer to every query alike (a hub; longer rationales do) still wins each comparison of `to_document` with the
    rivals, who do not move, and when all rollouts learn it nothing is won.

    Args:
        to_query_weight, to_document_weight, consistency_weight: of to_query, to_document and consistency.
        temperature: tau.
        centre: what is taken off each similarity first. `document`: the document's mean over the batch's queries, so that a
            hub among documents earns nothing. `both`: also the query's mean over the batch's rollouts, which does the same
            for rollouts of queries, where they are learned from. `none`: nothing.

    Raises:
        ValueError: B = 1 leaves `to_query` nothing to tell apart; an unknown centre.
    """
    if centre not in ("none", "document", "both"):
        raise ValueError(f"reward.centre={centre!r}: it is none, document or both")
    b = len(e.query)
    if b == 1:
        raise ValueError("reward=listwise needs at least 2 instances a batch: a single query is always found; raise datamodule.batch_size")
    similarity = _to_queries(e) / temperature
    to_negatives = torch.einsum("imd,jd->imj", e.negative, e.query) / temperature
    popular = similarity.mean(dim=(0, 1))  # [B], of each query with all documents
    if centre != "none":
        similarity, to_negatives = (s - s.mean(dim=2, keepdim=True) for s in (similarity, to_negatives))
    if centre == "both":
        similarity, to_negatives = similarity - popular, to_negatives - popular
    own = _own(similarity)  # [B, K]
    rivals = similarity.mean(dim=1).T  # [B, B]: of query i to document j
    rivals = rivals.masked_fill(~_others(b, rivals.device), -torch.inf)
    against = torch.cat([rivals, _own(to_negatives)], dim=1).logsumexp(dim=1, keepdim=True)  # [B, 1]
    terms = {
        "to_query": own - similarity.logsumexp(dim=2),
        "to_document": own - torch.logaddexp(own, against),
        "consistency": consistency(e.positive),
    }
    weights = {"to_query": to_query_weight, "to_document": to_document_weight, "consistency": consistency_weight}
    return combine(terms, weights)
