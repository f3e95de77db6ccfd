"""Advantages: rewards made relative to what the policy does anyway. Pure functions [B, K] -> [B, K]."""

import torch
from torch import Tensor


def grpo(rewards: Tensor, keep: Tensor, std: bool = False, epsilon: float = 1e-6) -> Tensor:
    """Group-relative advantages: reward less the mean of its group (Shao et al., arXiv 2402.03300).

    GRACE leaves out the division by the standard deviation (`std=False`).

    Args:
        rewards: [B, K] float32.
        keep: [B, K] bool; the rest has advantage 0 and no part in the mean.
        std: divide by the group's (unbiased) standard deviation plus `epsilon`.

    Returns:
        [B, K] float32; zero where a group keeps fewer than two rollouts, which have nothing to be compared with.
    """
    counts = keep.sum(dim=1, keepdim=True)
    mean = (rewards * keep).sum(dim=1, keepdim=True) / counts.clamp(min=1)
    advantages = torch.where(keep & (counts > 1), rewards - mean, 0.0)
    if std:
        deviation = (advantages.square().sum(dim=1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation + epsilon)
    return advantages
