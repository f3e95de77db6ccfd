"""Advantages: rewards relative to a baseline. Pure functions [B, K] -> [B, K].

The B instances are those of the global batch. `keep`, [B, K] bool, is False on rollouts that are left out: they have advantage 0 and no
part in any mean.
"""

import torch
from torch import Tensor


def grpo(rewards: Tensor, keep: Tensor, *, std: bool = False, epsilon: float = 1e-6) -> Tensor:
    """Returns group-relative advantages: the reward minus the mean of its group (GRPO, Shao et al., arXiv 2402.03300, section 4.1.2).

    GRPO divides by the group's standard deviation (`std=True`). GRACE does not, nor does Dr. GRPO (Liu et al., arXiv 2503.20783), which
    shows that the division gives more weight to groups whose rollouts hardly differ.

    Args:
        rewards: [B, K] float32.
        keep: [B, K] bool.
        std: divide by the group's (unbiased) standard deviation plus `epsilon`.

    Returns:
        [B, K] float32; zero where a group keeps fewer than two rollouts.
    """
    counts = keep.sum(dim=1, keepdim=True)
    mean = (rewards * keep).sum(dim=1, keepdim=True) / counts.clamp(min=1)
    advantages = torch.where(keep & (counts > 1), rewards - mean, 0.0)
    if std:
        deviation = (advantages.square().sum(dim=1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation + epsilon)
    return torch.where(varies(rewards, keep, dim=1), advantages, 0.0)


def varies(values: Tensor, counted: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Returns whether the counted values differ by more than rounding, 1e-6 of the largest: a division by the deviation, a rounding as
    well, would scale that up to the size of an advantage."""
    high = values.masked_fill(~counted, -torch.inf).amax(dim=dim, keepdim=True)
    low = values.masked_fill(~counted, torch.inf).amin(dim=dim, keepdim=True)
    return high - low > 1e-6 * torch.maximum(high.abs(), low.abs())


def rloo(rewards: Tensor, keep: Tensor) -> Tensor:
    """Returns leave-one-out advantages: the reward minus the mean of the group's others (RLOO, Ahmadian et al., arXiv 2402.14740, eq. 7).

    They are GRPO's without the standard deviation times n / (n - 1), n the group's kept rollouts. The baseline does not depend on the
    rollout itself.

    Args:
        rewards, keep: [B, K] float32 and bool.

    Returns:
        [B, K] float32; zero where a group keeps fewer than two rollouts.
    """
    counts = keep.sum(dim=1, keepdim=True)
    others = (rewards * keep).sum(dim=1, keepdim=True) - rewards
    advantages = torch.where(keep & (counts > 1), rewards - others / (counts - 1).clamp(min=1), 0.0)
    return torch.where(varies(rewards, keep, dim=1), advantages, 0.0)


def remax(rewards: Tensor, keep: Tensor, baseline: Tensor) -> Tensor:
    """Returns the reward minus that of the greedy rollout of the same text (ReMax, Li et al., arXiv 2310.10505, algorithm 1).

    It needs `algorithm.greedy_baseline=true`. Equal rollouts keep an advantage; with a group mean they have none.

    Args:
        rewards, keep: [B, K] float32 and bool.
        baseline: [B] float32, rewards of the greedy rollouts.

    Returns:
        [B, K] float32.
    """
    return torch.where(keep, rewards - baseline.unsqueeze(1), 0.0)


def best_of_group(rewards: Tensor, keep: Tensor) -> Tensor:
    """Returns n for the rollout with the largest reward of the n that a group keeps, else 0 (RAFT, Dong et al., arXiv 2304.06767).

    With the loss `reinforce`, which is divided by all n, this is supervised fine-tuning on the best of them.

    Args:
        rewards, keep: [B, K] float32 and bool.

    Returns:
        [B, K] float32; zero where a group keeps fewer than two rollouts, or all its rewards are equal.
    """
    best = rewards.masked_fill(~keep, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.where(varies(rewards, keep, dim=1), torch.zeros_like(rewards).scatter(1, best, 1.0) * keep.sum(dim=1, keepdim=True), 0.0)


def reinforce_pp(rewards: Tensor, keep: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Returns rewards standardised over the global batch (REINFORCE++, Hu et al., arXiv 2501.03262, section 3).

    A = (R - mean) / (std + epsilon), mean and (unbiased) standard deviation over all kept rollouts of all instances. The
    paper's penalty for leaving the reference is in R: `algorithm.kl_in=reward`. Some implementations count a rollout once for each of its
    tokens; here each counts once.

    Args:
        rewards, keep: [B, K] float32 and bool.

    Returns:
        [B, K] float32; zero where fewer than two rollouts are kept.
    """
    return _standardised(rewards, keep, epsilon)


def reinforce_pp_baseline(rewards: Tensor, keep: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Returns the reward minus the group's mean, standardised over the global batch (REINFORCE++-baseline, arXiv 2501.03262).

    Every group is divided by the same number, so that a group whose rollouts hardly differ keeps small advantages.

    Args:
        rewards, keep: [B, K] float32 and bool.

    Returns:
        [B, K] float32; zero where a group keeps fewer than two rollouts, which then have no part in the deviation.
    """
    compared = keep & (keep.sum(dim=1, keepdim=True) > 1)
    return _standardised(grpo(rewards, keep), compared, epsilon)


def _standardised(values: Tensor, counted: Tensor, epsilon: float) -> Tensor:
    n = counted.sum()
    centred = torch.where(counted, values - (values * counted).sum() / n.clamp(min=1), 0.0)
    deviation = (centred.square().sum() / (n - 1).clamp(min=1)).sqrt()
    return torch.where(varies(values, counted, dim=(0, 1)), centred / (deviation + epsilon), 0.0)
