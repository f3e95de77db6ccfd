"""How much each rollout's tokens count in a loss. Pure functions: lengths [n] of a minibatch's rollouts -> weights [n].

The loss is the sum over rollouts of weight times the sum over tokens, so it adds up over micro-batches.
"""

import torch
from torch import Tensor


def token_mean(lengths: Tensor) -> Tensor:
    """1 / (all tokens): the mean over tokens, in which long rationales weigh more (DAPO, Yu et al., arXiv 2503.14476, eq. 8)."""
    return torch.ones(lengths.shape, device=lengths.device) / lengths.sum().clamp(min=1)


def sequence_mean(lengths: Tensor) -> Tensor:
    """1 / (n |o_i|): the mean over rollouts of the mean over tokens (GRPO, Shao et al., arXiv 2402.03300, eq. 3).

    A token of a long rationale weighs less than one of a short rationale.
    """
    return 1.0 / (lengths.clamp(min=1) * len(lengths))


def constant(lengths: Tensor, *, tokens: int) -> Tensor:
    """1 / (n tokens): sums over tokens, divided by a number that no rationale changes (Dr. GRPO, Liu et al., arXiv 2503.20783).

    The mean over rollouts of whole log-probabilities (RLOO, ReMax) is this one too, but for the factor `tokens`, which
    keeps gradients on the scale of the other aggregations.

    Args:
        lengths: [n] int64.
        tokens: the constant, such as the length limit.
    """
    return torch.full(lengths.shape, 1.0 / (len(lengths) * tokens), device=lengths.device)
