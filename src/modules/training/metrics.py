"""Metrics of one batch: the modules write them, the callbacks read them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from src.modules.distributed.ranks import Ranks
from src.modules.objectives.info_nce import cosines
from src.modules.objectives.pairs import Pairs
from src.modules.objectives.roles import pairs_sharing
from src.modules.objectives.shaping import ShapedRewards
from src.modules.training.experience import Experience
from src.modules.types import Reward, Role, RolloutBatch


class BatchMetrics(Protocol):
    """One batch of any method: seconds by phase, tokens, and means over the optimiser's steps."""

    @property
    def update(self) -> dict[str, float]: ...

    @property
    def seconds(self) -> dict[str, float]: ...

    @property
    def rollout_tokens(self) -> int: ...

    @property
    def update_tokens(self) -> int: ...

    def headline(self) -> dict[str, str]:
        """Returns what a line of progress shows."""


@dataclass(frozen=True)
class GRACEMetrics:
    """One rollout batch of B instances with K rollouts each, of all ranks and the same on every rank; tensors are on the CPU.

    Attributes:
        reward: terms and total of the positives, before shaping.
        other_rewards: [G, K] float32 of the rollouts of queries and negatives that are learned from, by role.
        advantages: [B, K] float32, means over tokens.
        finished: [B, K] bool, False if a rollout met the length limit.
        rationale_lengths: [B, K] int64, tokens.
        distinct_rationales: share of different rationales among the B*K.
        unrelated_similarity: mean cosine between positives of different instances; nan if B = 1.
        false_negatives: pairs of instances that share a text as query or positive, which are left out of each other's in-batch terms.
        update: what Updater.update returns, and with a pathwise term pathwise_reward, the mean of the reward that it differentiates.
        logprob_mismatch: mean and largest absolute difference between the log-probs of engine and trainer, in nats a token; nan if no
            step was taken or the engine does not report them.
        seconds: of the phases rollout, encode, update and reference, as far as the algorithm has them; of the slowest rank.
        rollout_tokens: tokens sampled, all roles.
        update_tokens: tokens of the sequences that were updated on, a shared prompt counted for each rollout; 0 if no step was taken.
        instance_ids: B record ids.
    """

    reward: Reward
    other_rewards: dict[Role, Tensor]
    advantages: Tensor
    finished: Tensor
    rationale_lengths: Tensor
    distinct_rationales: float
    unrelated_similarity: float
    update: dict[str, float]
    logprob_mismatch: tuple[float, float]
    seconds: dict[str, float]
    rollout_tokens: int
    update_tokens: int
    instance_ids: list[str]
    false_negatives: int = 0

    def headline(self) -> dict[str, str]:
        """Returns mean reward and sampled tokens a second."""
        return {"reward": f"{float(self.reward.total.mean()):.3f}", "tokens/s": speed(self.rollout_tokens, self.seconds.get("rollout"))}


def grace_metrics(
    batch: RolloutBatch,
    reward: Reward,
    shaped: Mapping[Role, ShapedRewards],
    advantages: Tensor,
    learned_from: Experience | None,
    update: dict[str, float],
    seconds: float,
    ranks: Ranks,
) -> GRACEMetrics:
    """Returns the metrics of a rollout batch; all ranks call it together.

    Args:
        advantages: of the positives, [B, K, R], or [B, K, 1] for all tokens of a rationale.
        learned_from: what this rank updated on; None while groups are gathered.
        update: what Updater.update returned.
        seconds: of the update on this rank.
    """
    positive, phases = batch.roles["positive"], {**batch.seconds, "update": seconds}
    updated = 0 if learned_from is None else int((learned_from.rollouts.lengths * learned_from.keep.flatten()).sum())
    rollout_tokens, update_tokens = ranks.total(batch.rollout_tokens, updated)
    return GRACEMetrics(
        reward=replace(reward, terms={name: term.cpu() for name, term in reward.terms.items()}, total=reward.total.cpu()),
        other_rewards={role: part.raw.cpu() for role, part in shaped.items() if role != "positive"},
        advantages=(advantages.sum(dim=2) / positive.lengths if advantages.shape[2] > 1 else advantages[:, :, 0]).cpu(),
        finished=positive.finished.cpu(),
        rationale_lengths=positive.lengths.cpu(),
        distinct_rationales=batch.distinct_rationales,
        unrelated_similarity=unrelated_similarity(batch.embeddings.positive),
        false_negatives=pairs_sharing(batch.embeddings.same),
        logprob_mismatch=(update.pop("logprob_mismatch_mean", torch.nan), update.pop("logprob_mismatch_max", torch.nan)),
        update=update,
        seconds=dict(zip(phases, ranks.largest(*phases.values()), strict=True)),
        rollout_tokens=int(rollout_tokens),
        update_tokens=int(update_tokens) if update["updates"] else 0,
        instance_ids=list(batch.instance_ids),
    )


def unrelated_similarity(positive: Tensor) -> float:
    """Returns the mean cosine between positives of different instances; `positive` is [B, K, D] of unit vectors; nan if B = 1."""
    b = len(positive)
    if b == 1:
        return float("nan")
    means = positive.mean(dim=1)  # the mean of all cross similarities is that of the means
    # the sum of all products as the square of the sum, which autocast leaves in float32
    return float((means.sum(dim=0).square().sum() - means.square().sum()) / (b * (b - 1)))


@dataclass(frozen=True)
class ContrastiveMetrics:
    """One batch of contrastive learning with B instances.

    Attributes:
        accuracy: share of the queries whose own document is the most similar of all candidates.
        positive_similarity: mean cosine of queries and their documents.
        unrelated_similarity: mean cosine of different documents of the batch.
        false_negatives: see Pairs.
        update: loss (InfoNCE, nats), grad_norm (before clipping), and updates, which is 1.
        seconds: of the phase update.
        update_tokens: tokens of all texts, without padding.
        instance_ids: B record ids.
        rollout_tokens: 0, as no rationale is written.
    """

    accuracy: float
    positive_similarity: float
    unrelated_similarity: float
    update: dict[str, float]
    seconds: dict[str, float]
    update_tokens: int
    instance_ids: list[str]
    rollout_tokens: int = 0
    false_negatives: int = 0

    def headline(self) -> dict[str, str]:
        """Returns InfoNCE and tokens a second."""
        return {"loss": f"{self.update['loss']:.3f}", "tokens/s": speed(self.update_tokens, self.seconds.get("update"))}


def contrastive_metrics(
    embeddings: Tensor, pairs: Pairs, update: dict[str, float], seconds: dict[str, float], tokens: int, instance_ids: list[str]
) -> ContrastiveMetrics:
    """Returns the metrics of a batch; `embeddings`, [B + N, D], are of queries and documents."""
    queries, documents = embeddings.split([len(pairs.queries), len(pairs.documents)])
    similarity = cosines(queries, documents, pairs.left_out.to(embeddings.device)).cpu()
    among = cosines(documents, documents).cpu()
    n = len(documents)
    return ContrastiveMetrics(
        accuracy=float((similarity.argmax(dim=1) == pairs.own).float().mean()),
        positive_similarity=float(similarity[torch.arange(len(queries)), pairs.own].mean()),
        unrelated_similarity=float((among.sum() - among.trace()) / (n * (n - 1))),
        false_negatives=pairs.false_negatives,
        update=update,
        seconds=seconds,
        update_tokens=tokens,
        instance_ids=instance_ids,
    )


def speed(tokens: int, seconds: float | None) -> str:
    """Returns tokens a second, for a headline."""
    return f"{tokens / seconds:.0f}" if seconds else "?"
