"""Policy-gradient losses, token by token: pure functions on log-probs. How tokens are summed is up to an aggregation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.objectives.kl import k3


@dataclass(frozen=True)
class TokenLoss:
    """What each token of N rollouts adds; 0 outside the mask.

    Attributes:
        loss: [N, T] with gradient.
        clipped: [N, T] float32, 1 where the ratio was clipped with effect.
        kl: [N, T] float32, the k3 estimate of KL(sampling policy || policy).
    """

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> TokenLoss:
    """Clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7): -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A).

    r_t = exp(logprobs - old_logprobs). Where the two are equal (one update a rollout batch) its gradient is that of
    -A log pi(t), GRACE's own form. Different clips are DAPO's (arXiv 2503.14476, eq. 10): a higher one above lets unlikely
    tokens rise.

    Args:
        logprobs, old_logprobs: [N, T] float32 of the current and of the sampling policy.
        advantages: [N, T] float32, the same along a row unless credit is given token by token.
        mask: [N, T] bool, True on the tokens that count.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(-torch.minimum(plain, clipped) * mask, ((clipped < plain) & mask).float(), _from_old(log_ratio))


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    """-A log pi(t) (Williams, 1992): the policy gradient without a ratio, for one update a rollout batch.

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`; the old ones are only looked at.
    """
    own = torch.where(mask, logprobs, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return TokenLoss(-own * advantages, torch.zeros_like(log_ratio).detach(), _from_old(log_ratio))


def _from_old(log_ratio: Tensor) -> Tensor:
    return k3(torch.zeros_like(log_ratio), log_ratio.detach())
