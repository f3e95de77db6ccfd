"""From rollouts to embeddings and log-probs of the sampling policy: what an engine did not give, a pass computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.objectives.rewards import Embeddings
from src.modules.objectives.roles import Role
from src.modules.policy.attention.shared_prompt import micro_batches
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool, pool_prefixes
from src.modules.policy.reference import GroupEncoding
from src.modules.types import Rollouts
from src.records import Triplet


@dataclass(frozen=True)
class ScoredSide:
    """K rollouts of each of G texts, with what was computed from them before any update.

    Attributes:
        rollouts: G*K, those of a text side by side.
        embeddings: [G, K, D] unit vectors.
        old_logprobs: [G*K, T] float32 of the sampling policy; None where one update makes them those of the update.
        reference_logprobs: [G*K, T] float32 of the reference; None where the algorithm has none.
        prefixes: [G, K, R + 1, D] unit vectors after every token of the rationales; None unless asked for.
        instance_ids: G record ids.
    """

    rollouts: Rollouts
    embeddings: Tensor
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    prefixes: Tensor | None
    instance_ids: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """One batch before any update.

    Attributes:
        sides: those that are learned from, the positives first.
        embeddings: unit vectors of all sides, one rollout of each query and negative.
        rollout_tokens: tokens sampled, all sides.
        others: the sides that are not learned from, one rollout of each text, with the rollouts of all of them one side behind the
            other; None where every side is learned from.
    """

    sides: dict[Role, ScoredSide]
    embeddings: Embeddings
    rollout_tokens: int
    others: tuple[tuple[Role, ...], Rollouts] | None = None

    @property
    def positive(self) -> ScoredSide:
        return self.sides["positive"]


@dataclass(frozen=True)
class EncodedGroups:
    """Attributes: [G*K, D] embeddings; [G*K, T] log-probs and [G*K, R + 1, D] prefix embeddings, None where not asked for."""

    embeddings: Tensor
    logprobs: Tensor | None
    prefix_embeddings: Tensor | None


def encode_groups(
    policy: Policy, rollouts: Rollouts, how: GroupEncoding, with_logprobs: bool, with_prefixes: bool = False
) -> EncodedGroups:
    """What the engine met while it sampled is taken as it is if that is all that is asked for; else one pass computes all of it,
    so that embeddings and log-probs are those of one forward pass."""
    logprobs, prefixes = rollouts.logprobs if with_logprobs else None, rollouts.prefix_embeddings if with_prefixes else None
    given = rollouts.embeddings is not None and (logprobs is None) != with_logprobs and (prefixes is None) != with_prefixes
    if rollouts.embeddings is not None and given:
        return EncodedGroups(rollouts.embeddings, logprobs, prefixes)
    k, longest = how.num_generations, int(rollouts.rationale_lengths.max())
    pooled, values, cut = [], [], []
    for rows in micro_batches(rollouts, torch.arange(len(rollouts)), k, how.micro_batch_tokens):
        part = rollouts[rows]
        hidden = policy.hidden_states(part, rows // k) if with_logprobs else None  # one pass for both, where both read its states
        encoded = policy.encoder_states(part, hidden, rows // k)
        pooled.append(pool(encoded, part.pooling_mask, policy.pooling))
        if with_prefixes:
            cut.append(pool_prefixes(encoded, part, longest, policy.pooling))
        if hidden is not None:
            own, _ = policy.logprobs(part, hidden, how.temperature)
            values.append(torch.nn.functional.pad(own, (0, rollouts.input_ids.shape[1] - own.shape[1])))
    return EncodedGroups(torch.cat(pooled), torch.cat(values) if with_logprobs else None, torch.cat(cut) if with_prefixes else None)


def encode_others(policy: Policy, others: Rollouts, batch_size: int) -> Tensor:
    """[N, D] embeddings of texts with one rollout each; where the engine gives none, from batches of like lengths."""
    if others.embeddings is not None:
        return others.embeddings
    order = others.lengths.argsort()
    parts = [policy.embed(others[rows]) for rows in order.split(batch_size)]
    return torch.cat(parts)[order.argsort()]


def negatives_an_instance(batch: Sequence[Triplet]) -> int:
    """M.

    Raises:
        ValueError: the records differ in M.
    """
    counts = {len(triplet.negatives) for triplet in batch}
    if len(counts) != 1:
        raise ValueError(
            f"a batch must have one number of negatives an instance, this one has {sorted(counts)} (first record: {batch[0].id})"
        )
    return counts.pop()


def sampled_tokens(*sides: Rollouts) -> int:
    """Tokens of all the sides' rationales."""
    return sum(int(side.rationale_lengths.sum()) for side in sides)


def unrelated_similarity(positive: Tensor) -> float:
    """Mean cosine between positives of different instances; `positive` is [B, K, D] of unit vectors; nan where B = 1."""
    b = len(positive)
    if b == 1:
        return float("nan")
    means = positive.mean(dim=1)  # the mean of all cross similarities is that of the means
    # the sum of all products as the square of the sum, which autocast leaves in float32
    return float((means.sum(dim=0).square().sum() - means.square().sum()) / (b * (b - 1)))
