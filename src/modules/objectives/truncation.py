"""What a rollout earns that met the length limit before it had finished, or came near it."""

from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["relative", "constant", "mask", "none"]


def penalise_truncated(rewards: Tensor, finished: Tensor, penalty: Penalty = "relative", size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rewards with the truncated rollouts' replaced, and which rollouts count.

    Args:
        rewards, finished: [B, K] float32 and bool.
        penalty: `relative`, the lowest finished reward of the group less `size` times the standard deviation of all its
            rewards (so on the reward's own scale, whatever the temperature: nothing where all rewards of a group are equal);
            `constant`, -`size` as the published code has it (a reward, where rewards lie below it, as those of `listwise`
            do); `mask`, the rollout leaves both the group's baseline and the loss; `none`, it keeps its reward.
        size: of the penalty.

    Returns:
        rewards [B, K], and [B, K] bool that is False on rollouts to leave out. A group in which nothing finished keeps
        its rewards under `relative`, as there is nothing to be relative to.

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
    some = finished.any(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~finished, torch.inf).min(dim=1, keepdim=True).values
    # of all, not of the finished alone: one that finished has no spread, and the rest would go without a penalty
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(finished | ~some, rewards, lowest - size * std), everything


def soft_overlong(lengths: Tensor, *, max_tokens: int, slope: float = 0.2, size: float = 1.0) -> Tensor:
    """What is added to the rewards of long rollouts: a slope in place of a step (DAPO, Yu et al., arXiv 2503.14476, eq. 13).

    0 up to max_tokens - slope * max_tokens, from there down to -`size` at max_tokens. A rationale is never longer than the
    limit here, so one that met it is at the bottom.

    Args:
        lengths: [B, K] int64, tokens of the rationales.
        max_tokens: L_max, the length limit.
        slope: L_cache, the tokens over which it falls, as a share of the limit (a fifth in the paper).
        size: 1 in the paper, whose rewards are 1 and -1; here it is to be read against the spread of the rewards.

    Returns:
        [B, K] float32.

    Raises:
        ValueError: a slope that is no share.
    """
    if not 0 < slope <= 1:
        raise ValueError(f"algorithm.overlong.slope={slope}: it is a share of the length limit, above 0 and at most 1")
    falling = slope * max_tokens
    return ((max_tokens - falling - lengths) / falling).clamp(-1.0, 0.0) * size
