"""From rollouts to embeddings and log-probs of the sampling policy: what an engine did not give, a pass computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.datamodules.records import Triplet
from src.modules.policy import Policy
from src.modules.rewards import Embeddings
from src.modules.sequences import Rollouts


@dataclass(frozen=True)
class Scored:
    """Rollouts of one batch with what was computed from them before any update.

    Attributes:
        positive: the B*K rollouts of the positives.
        old_logprobs: [B*K, T] float32 of the sampling policy; None where one update makes them those of the update.
        embeddings: unit vectors of all sides.
        rollout_tokens: tokens sampled, all sides.
    """

    positive: Rollouts
    old_logprobs: Tensor | None
    embeddings: Embeddings
    rollout_tokens: int


@dataclass(frozen=True)
class PositiveEncoding:
    """How positives are passed through the policy: K rollouts each, so many instances at a time, at the sampling temperature."""

    num_rollouts: int
    micro_batch_size: int
    temperature: float


def encode_positives(policy: Policy, positive: Rollouts, how: PositiveEncoding, with_logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """[B*K, D] embeddings and, if asked for, [B*K, T] log-probs; what the engine met while it sampled is taken as it is."""
    embeddings, logprobs = positive.embeddings, positive.logprobs if with_logprobs else None
    if embeddings is not None and (logprobs is not None or not with_logprobs):
        return embeddings, logprobs
    k = how.num_rollouts
    pooled, values = [], []
    for rows in instance_rows(range(len(positive) // k), k, how.micro_batch_size):
        part = positive[rows]
        hidden = policy.hidden_states(part, k)  # one pass for both
        pooled.append(policy.embed(part, hidden, k))
        if with_logprobs:
            own, _ = policy.logprobs(part, hidden, how.temperature)
            values.append(torch.nn.functional.pad(own, (0, positive.input_ids.shape[1] - own.shape[1])))
    return torch.cat(pooled), torch.cat(values) if with_logprobs else None


def encode_others(policy: Policy, others: Rollouts, batch_size: int) -> Tensor:
    """[B + B*M, D] embeddings of queries and negatives; where the engine gives none, from batches of like lengths."""
    if others.embeddings is not None:
        return others.embeddings
    order = others.lengths.argsort()
    parts = [policy.embed(others[rows]) for rows in order.split(batch_size)]
    return torch.cat(parts)[order.argsort()]


def as_sides(positive: Tensor, others: Tensor, batch: Sequence[Triplet]) -> Embeddings:
    """Unit vectors from [B*K, D] of positives and [B + B*M, D] of queries, then negatives.

    Raises:
        ValueError: the records differ in M.
    """
    counts = {len(triplet.negatives) for triplet in batch}
    if len(counts) != 1:
        raise ValueError(
            f"a batch must have one number of negatives an instance, this one has {sorted(counts)} (first record: {batch[0].id})"
        )
    b = len(batch)
    return Embeddings.normalised(others[:b], positive.unflatten(0, (b, -1)), others[b:].unflatten(0, (b, counts.pop())))


def sampled_tokens(*sides: Rollouts) -> int:
    """Tokens of all the sides' rationales."""
    return sum(int(side.rationale_lengths.sum()) for side in sides)


def unrelated_similarity(positive: Tensor) -> float:
    """Mean cosine between positives of different instances; `positive` is [B, K, D] of unit vectors; nan where B = 1."""
    b = len(positive)
    if b == 1:
        return float("nan")
    means = positive.mean(dim=1)  # the mean of all cross similarities is that of the means
    return float(((means @ means.T).sum() - means.square().sum()) / (b * (b - 1)))


def instance_rows(instances: Sequence[int], k: int, per_micro: int) -> Iterator[Tensor]:
    """Row indices of `per_micro` instances at a time, K rows each."""
    for start in range(0, len(instances), per_micro):
        chosen = torch.tensor(list(instances[start : start + per_micro]))
        yield (chosen.unsqueeze(1) * k + torch.arange(k)).flatten()
