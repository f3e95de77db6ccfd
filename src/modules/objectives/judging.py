"""From the rewards of one side's rollouts to their advantages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.credit import at_tokens, from_tokens, prefix_rewards, token_advantages, token_returns
from src.modules.training.scoring import ScoredSide

RoleReward = Callable[[Tensor], Tensor]
"""Rewards [G, K] of a side's rollouts from their unit vectors [G, K, D] (see `standing_in`)."""


@dataclass(frozen=True)
class Greedy:
    """One greedy rollout for each of a side's G texts.

    Attributes:
        embeddings: [G, 1, D] unit vectors.
        lengths: [G, 1] int64, tokens of the rationales.
        finished: [G, 1] bool.
    """

    embeddings: Tensor
    lengths: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Judged:
    """Rewards as the advantage sees them, with whatever is added for length, truncation and distance from the reference.

    Attributes:
        earned: [G, K] float32, the rewards as they are.
        rewards: [G, K] float32, as the advantage sees them.
        keep: [G, K] bool, False on rollouts that are left out.
        baseline: [G] float32, rewards of greedy rollouts; None without them.
    """

    earned: Tensor
    rewards: Tensor
    keep: Tensor
    baseline: Tensor | None


def judge(algorithm: Algorithm, reward: RoleReward, side: ScoredSide, greedy: Greedy | None = None) -> Judged:
    """What a side's rollouts earned, and what the advantage is to make of it.

    A greedy rollout is scored as one more of its group, so that it has a consistency like the others, whose own rewards do
    not know of it. What is added for length and truncation is added to it too; the divergence from the reference is not.

    Raises:
        ValueError: the divergence is to be in the reward, and was scored without log-probs of policy and reference.
    """
    earned = reward(side.embeddings)
    b, k = earned.shape
    lengths, finished = side.rollouts.rationale_lengths.view(b, k), side.rollouts.finished.view(b, k)
    divergence = _divergence(algorithm, side).sum(dim=1).view(b, k) if algorithm.kl_in_reward else None
    if greedy is None:
        return Judged(earned, *algorithm.judged(earned, lengths, finished, divergence), baseline=None)
    together = reward(torch.cat([side.embeddings, greedy.embeddings], dim=1))
    rewards, keep = algorithm.judged(
        torch.cat([earned, together[:, -1:]], dim=1),
        torch.cat([lengths, greedy.lengths], dim=1),
        torch.cat([finished, greedy.finished], dim=1),
        None if divergence is None else torch.nn.functional.pad(divergence, (0, 1)),
    )
    return Judged(earned, rewards[:, :k], keep[:, :k], rewards[:, k])


def _divergence(algorithm: Algorithm, side: ScoredSide) -> Tensor:
    """[G*K, T] float32: from the reference by token, 0 outside of the rationales."""
    if side.old_logprobs is None or side.reference_logprobs is None:
        raise ValueError("algorithm.kl_in=reward needs log-probs of the policy and of its reference, and the batch was scored without")
    return algorithm.divergence(side.old_logprobs, side.reference_logprobs, side.rollouts.rationale_mask)


def by_token(algorithm: Algorithm, reward: RoleReward, side: ScoredSide, judged: Judged) -> Tensor:
    """[G*K, T] advantages of every token of a side's rationales, 0 elsewhere.

    A rationale's own for all its tokens, or with `gae_lambda` what each of them earned.
    """
    keep = judged.keep
    if side.prefixes is None or algorithm.gae_lambda is None:
        baseline = () if judged.baseline is None else (judged.baseline,)
        return algorithm.advantage(judged.rewards, keep, *baseline).flatten().unsqueeze(1) * side.rollouts.rationale_mask
    lengths = side.rollouts.rationale_lengths.view_as(keep)
    after = prefix_rewards(reward, side.prefixes)
    # with all others cut at its own length a rationale earns something else than with all of them whole
    at_end = judged.rewards - after.gather(2, lengths.unsqueeze(2)).squeeze(2)
    costs = None
    if algorithm.kl_in_reward:  # of the token that caused it, and not of the last
        by_tokens = algorithm.kl_coef * _divergence(algorithm, side)
        costs = from_tokens(by_tokens, side.rollouts, after.shape[2] - 1).unflatten(0, keep.shape)
        at_end = at_end + costs.sum(dim=2)
    returns = token_returns(after, at_end, lengths, algorithm.gae_lambda, costs)
    return at_tokens(token_advantages(algorithm.advantage, returns, lengths, keep).flatten(0, 1), side.rollouts)
