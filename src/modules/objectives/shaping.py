"""Reward shaping: what is added to raw rewards before advantages are computed. Pure functions.

The order is: truncation penalty, overlong slope, cost of tokens, divergence from the reference; each is added to what the one before gave.
A greedy rollout, if the baseline is one, is shaped by the numbers of its group and has no part in them; it is not charged for divergence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.objectives.algorithm import Algorithm, Penalty
from src.modules.types import RoleRollouts

RoleReward = Callable[[Tensor], Tensor]
"""Rewards [G, K] of the rollouts of one role from their unit vectors [G, K, D]; see roles.role_reward."""


@dataclass(frozen=True)
class ShapedRewards:
    """Rewards of the rollouts of one role, of all ranks.

    Attributes:
        raw: [G, K] float32, before shaping.
        rewards: [G, K] float32, as the advantage function takes them.
        keep: [G, K] bool, False on rollouts that are left out of baseline and loss.
        baseline: [G] float32, shaped rewards of greedy rollouts; None without them.
    """

    raw: Tensor
    rewards: Tensor
    keep: Tensor
    baseline: Tensor | None


def shape_rewards(algorithm: Algorithm, raw: Tensor, group: RoleRollouts, reward: RoleReward) -> ShapedRewards:
    """Shapes the raw rewards [G, K] of a role's rollouts.

    Args:
        reward: of the role's rollouts; called for greedy rollouts only, which are scored as one more of their group.
    """
    k, lengths, finished, scored = raw.shape[1], group.lengths, group.finished, raw
    divergence = None if group.divergence is None else group.divergence.sum(dim=2)
    if group.greedy is not None:
        together = reward(torch.cat([group.embeddings, group.greedy.embeddings], dim=1))
        scored = torch.cat([raw, together[:, -1:]], dim=1)
        lengths, finished = torch.cat([lengths, group.greedy.lengths], dim=1), torch.cat([finished, group.greedy.finished], dim=1)
        divergence = None if divergence is None else torch.nn.functional.pad(divergence, (0, 1))
    rewards, keep = shape(algorithm, scored, lengths, finished, divergence, k)
    return ShapedRewards(raw, rewards[:, :k], keep[:, :k], None if group.greedy is None else rewards[:, k])


def shape(
    algorithm: Algorithm, rewards: Tensor, lengths: Tensor, finished: Tensor, divergence: Tensor | None = None, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Applies the truncation penalty, the overlong slope, the cost of tokens and the divergence, in this order.

    Args:
        rewards, lengths, finished: [G, K] float32, int64 and bool.
        k: how many of the columns are the group; None: all.
        divergence: [G, K] float32, from the reference, summed over each rollout's tokens; None subtracts nothing.

    Returns:
        rewards [G, K], and [G, K] bool that is False on rollouts to leave out.
    """
    rewards, keep = penalise_truncated(rewards, finished, algorithm.truncation, algorithm.truncation_size, k)
    if algorithm.overlong is not None:  # after a penalty, which would replace it
        rewards = rewards + algorithm.overlong(lengths)
    rewards = rewards - algorithm.token_cost * lengths
    # last: a truncated rationale is charged for its distance like any other
    return rewards if divergence is None else rewards - algorithm.kl_coef * divergence, keep


def penalise_truncated(
    rewards: Tensor, finished: Tensor, penalty: Penalty = "relative", size: float = 1.0, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces the rewards of rollouts that met the length limit.

    The result goes to the advantage; the pathwise part of the gradient sees the raw rewards.

    Args:
        rewards, finished: [B, K] float32 and bool.
        penalty: `relative`, the lowest finished reward of the group minus `size` times the standard deviation of all its rewards (the
            scale of the reward itself; no penalty if all rewards of a group are equal); `constant`, -`size` as published (an advantage,
            where rewards lie below it, as those of `listwise` do); `mask`, the rollout is left out of the group's baseline and of the
            algorithm's loss; `none`, it keeps its reward.
        size: of the penalty.
        k: how many of the columns are the group, whose numbers `relative` takes; None: all.

    Returns:
        rewards [B, K], and [B, K] bool that is False on rollouts to leave out. A group in which no rollout finished keeps its rewards
        under `relative`.

    Raises:
        ValueError: an unknown penalty.
    """
    everything = torch.ones_like(finished)
    if penalty == "constant":
        return torch.where(finished, rewards, -size), everything
    if penalty == "mask":
        return rewards, finished
    if penalty == "none":
        return rewards, everything
    if penalty != "relative":
        raise ValueError(f"truncation penalty {penalty!r}: it is relative, constant, mask or none")
    some = finished[:, :k].any(dim=1, keepdim=True)
    lowest = rewards[:, :k].masked_fill(~finished[:, :k], torch.inf).min(dim=1, keepdim=True).values
    # of all rewards: a single finished one has no spread, and the others would not be penalised
    std = rewards[:, :k].std(dim=1, keepdim=True, correction=0)
    return torch.where(finished | ~some, rewards, lowest - size * std), everything


def soft_overlong(lengths: Tensor, *, max_tokens: int, slope: float = 0.2, size: float = 1.0) -> Tensor:
    """Returns a penalty that falls linearly near the length limit (DAPO, Yu et al., arXiv 2503.14476, eq. 13).

    0 up to max_tokens - slope * max_tokens, from there down to -`size` at max_tokens.

    Args:
        lengths: [B, K] int64, tokens of the rationales.
        max_tokens: L_max, the length limit.
        slope: L_cache, the tokens over which it falls, as a share of the limit (0.2 in the paper).
        size: 1 in the paper, whose rewards are 1 and -1; compare it with the spread of the rewards.

    Returns:
        [B, K] float32, to be added to the rewards.

    Raises:
        ValueError: a slope outside (0, 1].
    """
    if not 0 < slope <= 1:
        raise ValueError(f"algorithm.overlong.slope={slope}: it is a share of the length limit, above 0 and at most 1")
    falling = slope * max_tokens
    return ((max_tokens - falling - lengths) / falling).clamp(-1.0, 0.0) * size
