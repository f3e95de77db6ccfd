"""Contrastive rewards: how well the rationale of a document places the document among the batch, as numbers [B, K].

B instances of the global batch, K rollouts of each positive, M negatives an instance, D hidden size. Equations are from GRACE (Sun et al.,
arXiv 2510.04506, section 3), except for forms of this project, which say so. To try another reward, write one more function here with the
same first argument and result, and one YAML in configs/reward that names it. A reward that remembers something between batches is an
nn.Module, as `Novelty` is.

In-batch terms are over the j in `Embeddings.others` of i: not i itself, and no instance that has the query or the positive of i as its own
query or positive. Hard negatives are the record's, and all of them count: also one that is the positive of another instance with the same
query, which pairs.py leaves out. Two records contradict each other there, and it shows only in a batch that happens to hold both: a mask
[B, M] that every reward would have to heed would mend little.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from src.modules.types import Embeddings, Reward

RewardFunction = Callable[[Embeddings], Reward]
"""Unit vectors of a batch -> rewards of its B x K rollouts."""


def without_autocast(reward: RewardFunction) -> RewardFunction:
    """Returns the reward computed in float32 under autocast too: bfloat16 products would round away what a group's rollouts differ by."""
    return partial(_in_float32, reward)


def _in_float32(reward: RewardFunction, e: Embeddings) -> Reward:
    with torch.autocast(e.positive.device.type, enabled=False):
        return reward(e)


def combine(terms: dict[str, Tensor], weights: dict[str, float], scale: float = 1.0) -> Reward:
    """Returns the reward whose total is the weighted sum of the terms, times `scale`."""
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum(dim=0) * scale
    return Reward(terms, weights, total, scale)


def add_term(reward: Reward, name: str, term: Tensor, weight: float) -> Reward:
    """Returns the reward with one more term, [B, K], on the scale of the others."""
    total = reward.total + reward.scale * weight * term
    return Reward({**reward.terms, name: term}, {**reward.weights, name: weight}, total, reward.scale)


def consistency(positive: Tensor) -> Tensor:
    """Returns [B, K], the mean similarity of a rollout to the others of its group, 0 if K = 1; `positive` is [B, K, D]."""
    k = positive.shape[1]
    if k == 1:
        return positive.new_zeros(positive.shape[:2])
    similarity = positive @ positive.transpose(1, 2)  # [B, K, K]
    return (similarity.sum(dim=2) - similarity.diagonal(dim1=1, dim2=2)) / (k - 1)


def to_queries(e: Embeddings) -> tuple[Tensor, Tensor]:
    """Returns similarities of rollouts to queries: [B, K, B], of rollout k of instance i to query j, and of them the own ones, [B, K]."""
    similarity = torch.einsum("ikd,jd->ikj", e.positive, e.query)
    return similarity, similarity.diagonal(dim1=0, dim2=2).T


def mean_of_others(similarity: Tensor, others: Tensor) -> Tensor:
    """Returns [B, n], the mean of a [B, n, B] tensor over the in-batch negatives j of i, [B, B] bool; 0 without any."""
    return (similarity * others.unsqueeze(1)).sum(dim=2) / others.sum(dim=1, keepdim=True).clamp(min=1)


def paper(e: Embeddings, *, consistency_weight: float = 0.2, hard_weight: float = 0.2, temperature: float = 0.1) -> Reward:
    """Returns the published reward.

    positive = sim(h_q, h_p[k]); negative = -sum_m sim(h_q, h_n[m]); consistency as above;
    hard = -1/(B-1) sum_{j != i} max_l sim(h_q[i], h_p[j, l]) (0 if B = 1);
    total = (positive + negative + lambda1 consistency + lambda2 hard) / temperature.

    `negative` and `hard` are the same number for all K rollouts of an instance: a group baseline removes them.
    """
    b, k = e.positive.shape[:2]
    cross = torch.einsum("id,jld->ijl", e.query, e.positive).max(dim=2).values  # [B, B]
    hard = -(cross * e.others).sum(dim=1) / e.others.sum(dim=1).clamp(min=1)
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
    """Returns the published reward with both negative terms moved to the document's side, so that each depends on the rollout.

    negative = -sum_m sim(h_p[k], h_n[m]); hard = -mean (or max: `hard_reduction`) over j != i of sim(h_p[k], h_q[j]) (0 if B = 1);
    the rest as in `paper`. The unsupervised code of the GRACE authors uses the mean.
    """
    if hard_reduction not in ("mean", "max"):
        raise ValueError(f"reward.hard_reduction={hard_reduction!r}: it is mean or max")
    similarity, own = to_queries(e)
    others = e.others
    if hard_reduction == "mean":
        in_batch = -mean_of_others(similarity, others)
    else:
        nearest = similarity.masked_fill(~others.unsqueeze(1), -torch.inf).max(dim=2).values
        in_batch = torch.where(others.any(dim=1, keepdim=True), -nearest, 0.0)
    terms = {
        "positive": own,
        "negative": -torch.einsum("ikd,imd->ik", e.positive, e.negative),
        "consistency": consistency(e.positive),
        "hard": in_batch,
    }
    weights = {"positive": 1.0, "negative": 1.0, "consistency": consistency_weight, "hard": hard_weight}
    return combine(terms, weights, 1 / temperature)


def unsupervised(e: Embeddings, *, consistency_weight: float = 0.2, hard_weight: float = 0.2, temperature: float = 0.1) -> Reward:
    """Returns the published reward for instances of one text; the anchor, another rollout of it, takes the query's place.

    self = sim(anchor, h_p[k]); consistency as above; in_batch = -mean over j != i of sim(h_p[k], anchor[j]) (0 if B = 1);
    total = (self + lambda1 consistency + lambda2 in_batch) / temperature.

    Raises:
        ValueError: the records have negatives; this form has no term for them.
    """
    if e.negative.shape[1]:
        raise ValueError("reward=unsupervised has no term for negatives: use reward=document, or a datamodule of texts (datamodule=wiki1m)")
    similarity, own = to_queries(e)
    terms = {"self": own, "consistency": consistency(e.positive), "in_batch": -mean_of_others(similarity, e.others)}
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
    """Returns InfoNCE as a reward, this project's own: the log-probability that texts find their own among the batch's.

    With s[j] the similarity of a document to query j over tau:

    to_query = log softmax_j(s of h_p[i,k])[i]: the rollout finds its query.
    to_document = log of exp(s[i] of h_p[i,k]) over itself + sum_m exp(s[i] of h_n[i,m])
        + sum_{j != i} exp(mean_l s[i] of h_p[j,l]): the query finds the rollout.

    A shift common to all similarities cancels: a rationale that pulls all texts together gains nothing. A rollout that comes closer to
    all queries alike (a hub; longer rationales do this) still wins in `to_document` against rivals that are held fixed.

    Args:
        to_query_weight, to_document_weight, consistency_weight: of the terms.
        temperature: tau.
        centre: the mean that is subtracted from each similarity first. `document`: over the batch's queries, against hubs among documents.
            `both`: also over the batch's rollouts, against hubs among queries. `none`: no mean.

    Raises:
        ValueError: B = 1; an unknown centre.
    """
    if centre not in ("none", "document", "both"):
        raise ValueError(f"reward.centre={centre!r}: it is none, document or both")
    b = len(e.query)
    if b == 1:
        raise ValueError("reward=listwise needs at least 2 instances a batch: a single query is always found; raise datamodule.batch_size")
    similarity = to_queries(e)[0] / temperature
    to_negatives = torch.einsum("imd,jd->imj", e.negative, e.query) / temperature
    popular = similarity.mean(dim=(0, 1))  # [B], of each query with all documents
    if centre != "none":
        similarity, to_negatives = (s - s.mean(dim=2, keepdim=True) for s in (similarity, to_negatives))
    if centre == "both":
        similarity, to_negatives = similarity - popular, to_negatives - popular
    own = similarity.diagonal(dim1=0, dim2=2).T  # [B, K]
    candidates = e.others | torch.eye(b, dtype=torch.bool, device=own.device)  # [B, B], with the own query
    rivals = similarity.mean(dim=1).T  # [B, B]: of query i to document j
    rivals = rivals.masked_fill(~e.others, -1e9)
    # a number and not minus infinity: the gradient of a logsumexp of nothing but that is nan
    against = torch.cat([rivals, to_negatives.diagonal(dim1=0, dim2=2).T], dim=1).logsumexp(dim=1, keepdim=True)  # [B, 1]
    terms = {
        "to_query": own - similarity.masked_fill(~candidates.unsqueeze(1), -torch.inf).logsumexp(dim=2),
        "to_document": own - torch.logaddexp(own, against),
        "consistency": consistency(e.positive),
    }
    weights = {"to_query": to_query_weight, "to_document": to_document_weight, "consistency": consistency_weight}
    return combine(terms, weights)


class Novelty(nn.Module):
    """Adds a term that remembers to another reward, this project's own: rollouts are to differ from what the previous batch asked for.

    novelty = -mean_j sim(h_p[k], previous h_q[j]), over the queries of the previous global batch. The first batch has no such term.

    Args:
        reward: gives the other terms; the new one is on their scale.
        novelty_weight: of the new term.
    """

    previous: Tensor
    """[B, D], queries of the previous batch as they were embedded then; [0] before the first. A buffer, so that checkpoints have it."""

    def __init__(self, reward: RewardFunction, *, novelty_weight: float = 0.2) -> None:
        super().__init__()
        self.reward, self.novelty_weight = reward, novelty_weight
        self.register_buffer("previous", torch.zeros(0))

    def forward(self, e: Embeddings) -> Reward:
        reward = self.reward(e)
        if not self.previous.numel():
            return reward
        return add_term(reward, "novelty", -(e.positive @ self.previous.T).mean(dim=2), self.novelty_weight)

    def remember(self, e: Embeddings) -> None:
        """Takes the queries of a batch, of all ranks, for the next one."""
        self.previous = e.query.detach().clone()
        if hasattr(self.reward, "remember"):
            self.reward.remember(e)
