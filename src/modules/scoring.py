"""From rollouts to embeddings and log-probs of the sampling policy: what an engine did not give, a pass computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from src.datamodules.records import Triplet
from src.modules.policy import Policy
from src.modules.pooling import pool, pool_prefixes
from src.modules.rewards import Embeddings
from src.modules.sequences import Rollouts


@dataclass(frozen=True)
class Scored:
    """Rollouts of one batch with what was computed from them before any update.

    Attributes:
        positive: the B*K rollouts of the positives.
        old_logprobs: [B*K, T] float32 of the sampling policy; None where one update makes them those of the update.
        reference_logprobs: [B*K, T] float32 of the reference; None where the algorithm has none.
        embeddings: unit vectors of all sides.
        prefixes: [B, K, R + 1, D] unit vectors of the positives after every token of their rationales; None unless asked for.
        rollout_tokens: tokens sampled, all sides.
    """

    positive: Rollouts
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    embeddings: Embeddings
    prefixes: Tensor | None
    rollout_tokens: int


@dataclass(frozen=True)
class PositiveEncoding:
    """How positives are passed through the policy: K rollouts each, so many tokens at a time, at the sampling temperature."""

    num_rollouts: int
    micro_batch_tokens: int
    temperature: float


@dataclass(frozen=True)
class EncodedPositives:
    """Attributes: [B*K, D] embeddings; [B*K, T] log-probs and [B*K, R + 1, D] prefix embeddings, None where not asked for."""

    embeddings: Tensor
    logprobs: Tensor | None
    prefix_embeddings: Tensor | None


def encode_positives(
    policy: Policy, positive: Rollouts, how: PositiveEncoding, with_logprobs: bool, with_prefixes: bool = False
) -> EncodedPositives:
    """What the engine met while it sampled is taken as it is; one pass computes what it did not give."""
    logprobs, prefixes = positive.logprobs if with_logprobs else None, positive.prefix_embeddings if with_prefixes else None
    given = positive.embeddings is not None and (logprobs is None) != with_logprobs and (prefixes is None) != with_prefixes
    if positive.embeddings is not None and given:
        return EncodedPositives(positive.embeddings, logprobs, prefixes)
    k, longest = how.num_rollouts, int(positive.rationale_lengths.max())
    pooled, values, cut = [], [], []
    for rows in micro_batches(positive, torch.arange(len(positive)), k, how.micro_batch_tokens):
        part = positive[rows]
        hidden = policy.hidden_states(part, rows // k)  # one pass for all
        encoded = policy.encoder_states(part, hidden, rows // k)
        pooled.append(pool(encoded, part.pooling_mask, policy.pooling))
        if with_prefixes:
            cut.append(pool_prefixes(encoded, part, longest, policy.pooling))
        if with_logprobs:
            own, _ = policy.logprobs(part, hidden, how.temperature)
            values.append(torch.nn.functional.pad(own, (0, positive.input_ids.shape[1] - own.shape[1])))
    return EncodedPositives(torch.cat(pooled), torch.cat(values) if with_logprobs else None, torch.cat(cut) if with_prefixes else None)


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


def micro_batches(rollouts: Rollouts, rows: Tensor, k: int, tokens: int) -> Iterator[Tensor]:
    """Cuts rows, [n] int64 ascending with K to an instance, into parts of at most `tokens` tokens; [n_i] int64 each.

    A prompt counts once in a part. Instances stay whole where they fit, as a prompt is computed again in every part that
    has rationales of it. A rollout that alone is longer stands alone.
    """
    prompts, own = rollouts.prompt_lengths.tolist(), rollouts.rationale_lengths.tolist()
    part: list[int] = []
    used = 0
    for _, members in groupby(rows.tolist(), lambda row: row // k):
        instance = list(members)
        prompt, whole = prompts[instance[0]], sum(own[row] for row in instance)
        if part and used + prompt + whole > tokens:
            yield torch.tensor(part)
            part, used = [], 0
        used += prompt
        for row in instance:
            if part and used + own[row] > tokens:
                yield torch.tensor(part)
                part, used = [], prompt
            part.append(row)
            used += own[row]
    if part:
        yield torch.tensor(part)
