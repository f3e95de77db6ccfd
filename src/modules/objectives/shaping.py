"""Reward shaping: what is added to the raw rewards of a group before advantages are computed. Pure functions.

The order is: truncation penalty, overlong slope, cost of tokens, divergence from the reference. A greedy rollout, if the baseline is one,
gets the same penalty and costs, but is not charged for divergence, and the group's penalty does not depend on it.
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
        penalty: [G, K] float32, what truncation, the overlong slope and the cost of tokens added to them.
        rewards: [G, K] float32, raw + penalty - kl_coef * divergence, as the advantage function takes them.
        keep: [G, K] bool, False on rollouts that are left out of the baseline and of the algorithm's loss (`truncation: mask`).
        baseline: [G] float32, shaped rewards of the greedy rollouts; None without them.
    """

    raw: Tensor
    penalty: Tensor
    rewards: Tensor
    keep: Tensor
    baseline: Tensor | None


def shape_rewards(algorithm: Algorithm, raw: Tensor, group: RoleRollouts, reward_of: RoleReward) -> ShapedRewards:
    """Shapes the raw rewards [G, K] of a role's rollouts.

    Args:
        reward_of: called for greedy rollouts only, which are rewarded as one more of their group.
    """
    floor = truncated_reward(raw, group.finished, algorithm.truncation, algorithm.truncation_size)
    charged = charge(algorithm, raw, group.lengths, group.finished, floor)
    # last: a truncated rationale is charged for its distance like any other
    rewards = charged if group.divergence is None else charged - algorithm.kl_coef * group.divergence.sum(dim=2)
    keep = group.finished if algorithm.truncation == "mask" else torch.ones_like(group.finished)
    baseline = None
    if group.greedy is not None:
        greedy = reward_of(torch.cat([group.embeddings, group.greedy.embeddings], dim=1))[:, -1:]
        baseline = charge(algorithm, greedy, group.greedy.lengths, group.greedy.finished, floor).squeeze(1)
    return ShapedRewards(raw, charged - raw, rewards, keep, baseline)


def charge(algorithm: Algorithm, rewards: Tensor, lengths: Tensor, finished: Tensor, floor: Tensor) -> Tensor:
    """Returns [G, K] float32: rewards with the truncation penalty, the overlong slope and the cost of tokens.

    Args:
        rewards, lengths, finished: [G, K] float32, int64 and bool.
        floor: [G, 1], see truncated_reward.
    """
    rewards = torch.where(finished | floor.isnan(), rewards, floor)
    if algorithm.overlong is not None:  # after the penalty, which would replace it
        rewards = rewards + algorithm.overlong(lengths)
    return rewards - algorithm.token_cost * lengths


def truncated_reward(rewards: Tensor, finished: Tensor, penalty: Penalty = "relative", size: float = 1.0) -> Tensor:
    """Returns [G, 1] float32, the reward that replaces those of a group's truncated rollouts; NaN where they keep their own.

    A rollout is truncated if the length limit cut it before EOS. The pathwise part of the gradient sees its raw reward.

    Args:
        rewards, finished: [G, K] float32 and bool.
        penalty:
            `relative`: the lowest finished reward of the group minus `size` times the standard deviation of all its rewards, which is the
            scale of the reward itself. No penalty if no rollout of the group finished, or if all rewards are equal.
            `constant`: -`size`, as published. Rewards that lie below it, as those of `listwise` do, are raised.
            `mask`: no replacement; the rollout is left out of the group's baseline and of the algorithm's loss (ShapedRewards.keep).
            `none`: no replacement.
        size: of the penalty.

    Raises:
        ValueError: an unknown penalty.
    """
    if penalty in ("mask", "none"):
        return torch.full_like(rewards[:, :1], torch.nan)
    if penalty == "constant":
        return torch.full_like(rewards[:, :1], -size)
    if penalty != "relative":
        raise ValueError(f"truncation penalty {penalty!r}: it is relative, constant, mask or none")
    lowest = rewards.masked_fill(~finished, torch.inf).min(dim=1, keepdim=True).values
    # of all rewards: a single finished one has no spread, and the others would not be penalised
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(finished.any(dim=1, keepdim=True), lowest - size * std, torch.nan)


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
