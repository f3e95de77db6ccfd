"""Credit along a rationale: which of its tokens earned the reward. Pure functions.

A mean-pooled embedding exists after every token, so the reward of a rationale cut there can be computed too, and it says
what the tokens so far have earned. This is the project's own addition to GRACE, which gives every token of a rationale
the rationale's advantage.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from src.modules.types import Rollouts


def prefix_rewards(reward: Callable[[Tensor], Tensor], prefixes: Tensor) -> Tensor:
    """Rewards if every rationale of a side were cut after t tokens, t = 0 .. R; the other sides are taken as they are.

    Args:
        reward: of the side's rollouts from their unit vectors, [G, K, D] -> [G, K] (see `standing_in`).
        prefixes: [G, K, R + 1, D] unit vectors after t tokens; where a rationale has fewer, its last.

    Returns:
        [G, K, R + 1] float32. The value at a rationale's own end is not its reward: the others are cut there as well.
    """
    return torch.stack([reward(prefixes[:, :, t]) for t in range(prefixes.shape[2])], dim=2)


def token_returns(prefix_rewards: Tensor, at_end: Tensor, lengths: Tensor, decay: float, costs: Tensor | None = None) -> Tensor:
    """What the reward gained from each token on, later tokens counting less.

    G[t] = sum_{l >= 0} decay^l (F[t + l + 1] - F[t + l]), F[t] the reward after t tokens: generalised advantage estimation
    (Schulman et al., arXiv 1506.02438, eq. 16) with the prefix reward as its value function; `at_end` makes F[end] what the
    rationale earned. decay = 1 is the reward still to come, F[end] - F[t]: F[t] depends on no token of the rationale from t
    on, so it is a baseline that leaves the mean of the gradient as it is. Below 1 a token is judged by what follows soon,
    with far less noise and some bias; a term of the reward that is one number for a whole group then cancels among
    rationales of one length alone.

    Args:
        prefix_rewards: [B, K, R + 1].
        at_end: [B, K], what the last token gains besides: the rationale's reward, with any penalty, less F at its length.
        lengths: [B, K] int64, tokens of each rationale, at least 1.
        decay: 0 to 1.
        costs: [B, K, R], what each token loses besides, such as its divergence from the reference; 0 past the end.

    Returns:
        [B, K, R] float32, 0 past a rationale's end.
    """
    steps = prefix_rewards.shape[2] - 1
    positions = torch.arange(steps, device=prefix_rewards.device)
    ends = positions == lengths.unsqueeze(2) - 1
    gains = (prefix_rewards[:, :, 1:] - prefix_rewards[:, :, :-1]) * (positions < lengths.unsqueeze(2)) + at_end.unsqueeze(2) * ends
    if costs is not None:
        gains = gains - costs
    returns = torch.zeros_like(gains)
    ahead = torch.zeros_like(at_end)
    for t in range(steps - 1, -1, -1):
        ahead = gains[:, :, t] + decay * ahead
        returns[:, :, t] = ahead
    return returns


def token_advantages(advantage: Callable[[Tensor, Tensor], Tensor], returns: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """[B, K, R]: at each position the advantages of its returns [B, K] among the kept rollouts that reach it."""
    reached = torch.arange(returns.shape[2], device=returns.device) < lengths.unsqueeze(2)
    columns = [advantage(returns[:, :, t], keep & reached[:, :, t]) for t in range(returns.shape[2])]
    return torch.stack(columns, dim=2)


def from_tokens(values: Tensor, rollouts: Rollouts, longest: int) -> Tensor:
    """[N, R] of the rationales' tokens from values [N, T] at their positions, 0 past a rationale's end; R = `longest`."""
    mask = rollouts.rationale_mask
    rows, columns = mask.nonzero(as_tuple=True)
    taken = values.new_zeros(len(mask), longest)
    taken[rows, columns - rollouts.prompt_lengths[rows]] = values[rows, columns]
    return taken


def at_tokens(values: Tensor, rollouts: Rollouts) -> Tensor:
    """[N, R] values of the rationales' tokens as [N, T], each at its token's position, 0 elsewhere."""
    mask = rollouts.rationale_mask
    rows, columns = mask.nonzero(as_tuple=True)
    placed = values.new_zeros(mask.shape)
    placed[rows, columns] = values[rows, columns - rollouts.prompt_lengths[rows]]
    return placed
