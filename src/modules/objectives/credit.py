"""Advantages of tokens: a rationale's own for all its tokens, as published, or what each token contributed (token credit).

A mean-pooled embedding exists after every token, so the reward of a rationale cut there can be computed as well; differences of these
prefix rewards say what each token contributed. Token credit is this project's addition to GRACE. Pure functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.shaping import RoleReward, ShapedRewards
from src.modules.types import RoleRollouts, Rollouts


def token_advantages(algorithm: Algorithm, shaped: ShapedRewards, group: RoleRollouts, reward_of: RoleReward) -> Tensor:
    """Returns [G, K, R] advantages of the rationales' tokens, 0 past their ends; [G, K, 1] without `gae_lambda`: one for all tokens.

    Args:
        reward_of: called for every prefix length with `gae_lambda`.

    Raises:
        ValueError: `gae_lambda` without the embeddings of prefixes.
    """
    if algorithm.gae_lambda is None:
        baseline = () if shaped.baseline is None else (shaped.baseline,)
        return algorithm.advantage(shaped.rewards, shaped.keep, *baseline).unsqueeze(2)
    if group.prefixes is None:
        raise ValueError(f"algorithm.gae_lambda={algorithm.gae_lambda} needs the embeddings of prefixes, and these rollouts have none")
    after = prefix_rewards(reward_of, group.prefixes)
    # the reward of a prefix as long as the rationale is not the rationale's reward: the other rollouts are cut at that length too
    at_end = shaped.raw - after.gather(2, group.lengths.unsqueeze(2)).squeeze(2)
    costs = None
    if group.divergence is not None:  # charged to the token that caused it
        costs = algorithm.kl_coef * group.divergence
        costs = torch.nn.functional.pad(costs, (0, after.shape[2] - 1 - costs.shape[2]))
    returns = token_returns(after, at_end, group.lengths, algorithm.gae_lambda, costs)
    # The penalty is added to all tokens and does not decay. The last tokens of the longest rationale have no other rationale to be
    # compared with, so a penalty on them alone would have no effect.
    reached = torch.arange(returns.shape[2], device=returns.device) < group.lengths.unsqueeze(2)
    returns = returns + shaped.penalty.unsqueeze(2) * reached
    return compare_by_position(algorithm.advantage, returns, group.lengths, shaped.keep)


def prefix_rewards(reward_of: RoleReward, prefixes: Tensor) -> Tensor:
    """Returns [G, K, R + 1] float32, the rewards if every rationale of a role were cut after t = 0 .. R tokens.

    Args:
        reward_of: the reward of the role's rollouts; embeddings of the other roles are held.
        prefixes: [G, K, R + 1, D] unit vectors, constant past a rationale's end.
    """
    return torch.stack([reward_of(prefixes[:, :, t]) for t in range(prefixes.shape[2])], dim=2)


def token_returns(prefix_rewards: Tensor, at_end: Tensor, lengths: Tensor, gae_lambda: float, costs: Tensor | None = None) -> Tensor:
    """Returns what the reward gains from each token on, [B, K, R] float32, 0 past a rationale's end.

    G[t] = sum_{l >= 0} lambda^l (F[t + l + 1] - F[t + l]), with F[t] the reward after t tokens: generalised advantage estimation (Schulman
    et al., arXiv 1506.02438, eq. 16) with prefix rewards as the value function. With lambda = 1 it is the reward still to come,
    F[end] - F[t]: F[t] depends on no token from t on, so it is a baseline that leaves the mean of the gradient unchanged. Below 1 the noise
    is smaller and there is a bias; a term that is one number for a group then cancels only among rationales of one length.

    Args:
        prefix_rewards: [B, K, R + 1].
        at_end: [B, K], added to the gain of the last token: the raw reward of the rationale minus F at its length.
        lengths: [B, K] int64, tokens of each rationale, at least 1.
        gae_lambda: 0 to 1.
        costs: [B, K, R], subtracted from the gain of each token, such as its divergence; 0 past the end.
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
        ahead = gains[:, :, t] + gae_lambda * ahead
        returns[:, :, t] = ahead
    return returns


def compare_by_position(advantage: Callable[[Tensor, Tensor], Tensor], returns: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Returns [B, K, R]: at each position the advantages of the returns [B, K] among the kept rollouts that reach it.

    Their number n falls towards the end of the longest, so a mean that includes the rollout itself (`grpo`) weighs later tokens less, by
    (n - 1) / n; the mean of the others (`rloo`, arXiv 2402.14740) does not. A token that one rollout alone reaches has no comparison and,
    by either, no advantage: its return would bring what all rationales of the group gain as an advantage of its own.
    """
    reached = torch.arange(returns.shape[2], device=returns.device) < lengths.unsqueeze(2)
    columns = [advantage(returns[:, :, t], keep & reached[:, :, t]) for t in range(returns.shape[2])]
    return torch.stack(columns, dim=2)


def from_tokens(values: Tensor, rollouts: Rollouts) -> Tensor:
    """Returns [N, R] of the rationales' tokens from values [N, T] at their positions, 0 past a rationale's end."""
    mask, longest = rollouts.rationale_mask, int(rollouts.rationale_lengths.max())
    rows, columns = mask.nonzero(as_tuple=True)
    taken = values.new_zeros(len(mask), longest)
    taken[rows, columns - rollouts.prompt_lengths[rows]] = values[rows, columns]
    return taken


def at_tokens(values: Tensor, rollouts: Rollouts) -> Tensor:
    """Returns [N, T] from values [N, R] of the rationales' tokens, or [N, 1] for all of them: each at its position, 0 elsewhere."""
    mask = rollouts.rationale_mask
    if values.shape[1] == 1:
        return values * mask
    rows, columns = mask.nonzero(as_tuple=True)
    placed = values.new_zeros(mask.shape)
    placed[rows, columns] = values[rows, columns - rollouts.prompt_lengths[rows]]
    return placed
