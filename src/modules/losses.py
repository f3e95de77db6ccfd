"""Policy-gradient losses on rationale tokens. Pure functions that return sums, so that micro-batches add up exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the tokens of a micro-batch.

    Attributes:
        loss: scalar with gradient.
        clipped: scalar, tokens whose ratio was clipped with effect.
        kl: scalar, sum of the k3 estimate of KL(sampling policy || policy), (r - 1) - log r with r the ratio.
    """

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> TokenLoss:
    """Clipped surrogate, token by token (Schulman et al., arXiv 1707.06347, eq. 7).

    -sum_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), with r_t = exp(logprobs - old_logprobs). Where the two
    are equal (one update per rollout batch) its gradient is that of -sum_t A log pi(t), GRACE's own form.

    Args:
        logprobs, old_logprobs: [N, T] float32 of the current and of the sampling policy.
        advantages: [N, T] float32, the same along a row unless credit is given token by token.
        mask: [N, T] bool, True on the tokens that count.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -(torch.minimum(plain, clipped) * mask).sum()
    with torch.no_grad():
        touched = ((clipped < plain) & mask).sum()
        kl = ((ratio - 1 - log_ratio) * mask).sum()
    return TokenLoss(loss, touched, kl)
