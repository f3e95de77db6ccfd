"""From a batch's rewards to what its advantages are made of."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.modules.algorithm import Algorithm
from src.modules.credit import at_tokens, prefix_rewards, token_advantages, token_returns
from src.modules.rewards import Embeddings, Reward
from src.modules.scoring import Scored


@dataclass(frozen=True)
class Greedy:
    """One greedy rollout for each of B positives.

    Attributes:
        embeddings: [B, 1, D] unit vectors.
        lengths: [B, 1] int64, tokens of the rationales.
        finished: [B, 1] bool.
    """

    embeddings: Tensor
    lengths: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Judged:
    """Rewards as the advantage sees them, with whatever is added for length, truncation and distance from the reference.

    Attributes:
        rewards: [B, K] float32.
        keep: [B, K] bool, False on rollouts that are left out.
        baseline: [B] float32, rewards of greedy rollouts; None without them.
    """

    rewards: Tensor
    keep: Tensor
    baseline: Tensor | None


def judge(
    algorithm: Algorithm, reward: Callable[[Embeddings], Reward], scored: Scored, total: Tensor, greedy: Greedy | None = None
) -> Judged:
    """Rewards [B, K] of a scored batch, as they are, to rewards as the advantage sees them.

    A greedy rollout is scored as one more of its group, so that it has a consistency like the others, whose own rewards do
    not know of it. What is added for length and truncation is added to it too; the divergence from the reference is not.

    Raises:
        ValueError: the divergence is to be in the reward, and was scored without log-probs of policy and reference.
    """
    b, k = total.shape
    lengths, finished = scored.positive.rationale_lengths.view(b, k), scored.positive.finished.view(b, k)
    divergence = _divergence(algorithm, scored).view(b, k) if algorithm.kl_in_reward else None
    if greedy is None:
        return Judged(*algorithm.judged(total, lengths, finished, divergence), baseline=None)
    together = replace(scored.embeddings, positive=torch.cat([scored.embeddings.positive, greedy.embeddings], dim=1))
    rewards, keep = algorithm.judged(
        torch.cat([total, reward(together).total[:, -1:]], dim=1),
        torch.cat([lengths, greedy.lengths], dim=1),
        torch.cat([finished, greedy.finished], dim=1),
        None if divergence is None else torch.nn.functional.pad(divergence, (0, 1)),
    )
    return Judged(rewards[:, :k], keep[:, :k], rewards[:, k])


def _divergence(algorithm: Algorithm, scored: Scored) -> Tensor:
    """[B*K] float32: from the reference, summed over each rationale's tokens."""
    if scored.old_logprobs is None or scored.reference_logprobs is None:
        raise ValueError("algorithm.kl_in=reward needs log-probs of the policy and of its reference, and the batch was scored without")
    return algorithm.divergence(scored.old_logprobs, scored.reference_logprobs, scored.positive.rationale_mask).sum(dim=1)


def by_token(algorithm: Algorithm, reward: Callable[[Embeddings], Reward], scored: Scored, judged: Judged, penalty: Tensor) -> Tensor:
    """[B*K, T] advantages of every token of the positives' rationales, 0 elsewhere.

    A rationale's own for all its tokens, or with `credit_decay` what each of them earned; `penalty`, [B, K], is what
    `judge` added to the rewards.
    """
    keep = judged.keep
    if scored.prefixes is None or algorithm.credit_decay is None:
        baseline = () if judged.baseline is None else (judged.baseline,)
        return algorithm.advantage(judged.rewards, keep, *baseline).flatten().unsqueeze(1) * scored.positive.rationale_mask
    lengths = scored.positive.rationale_lengths.view_as(keep)
    returns = token_returns(prefix_rewards(reward, scored.embeddings, scored.prefixes), penalty, lengths, algorithm.credit_decay)
    return at_tokens(token_advantages(algorithm.advantage, returns, lengths, keep).flatten(0, 1), scored.positive)
