"""The parts of a policy-gradient loss: token losses, sums over tokens, estimates of the divergence, importance weights.

Pure functions on log-probs [N, T] and lengths [n].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]

# ---- divergence from another policy


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Returns -log r with r = pi_ref / pi, for tokens drawn from pi; unbiased for KL(pi || pi_ref), of high variance, often negative.

    As a loss its mean gradient is 0. (All three: Schulman, http://joschu.net/blog/kl-approx.html; any shape -> the same shape.)
    """
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Returns (log r)^2 / 2: biased, never negative; as a loss its mean gradient is that of the divergence."""
    return (reference - logprobs).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Returns (r - 1) - log r: unbiased, never negative (GRPO, arXiv 2402.03300, eq. 4); as a loss it pushes as the reverse divergence.

    log r is bounded to [-20, 20] nats, as r overflows; beyond the bound the gradient is 0.
    """
    log_ratio = (reference - logprobs).clamp(-20.0, 20.0)
    return log_ratio.exp() - 1 - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}

# ---- token losses


@dataclass(frozen=True)
class TokenLoss:
    """The loss of each token of N rollouts; 0 outside the mask.

    Attributes:
        loss: [N, T] with gradient.
        clipped: [N, T] float32, 1 where clipping took effect.
        kl: [N, T] float32, the k3 estimate of KL(sampling policy || policy).
    """

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> TokenLoss:
    """Returns the clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7): -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A).

    r_t = exp(logprobs - old_logprobs). If the two are equal (one update a rollout batch) its gradient is that of -A log pi(t), GRACE's
    form. Different clips are DAPO's (arXiv 2503.14476, eq. 10): a larger clip_high lets unlikely tokens rise.

    Args:
        logprobs, old_logprobs: [N, T] float32 of the current and of the sampling policy.
        advantages: [N, T] float32.
        mask: [N, T] bool, True on the tokens that count.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    kl = k3(torch.zeros_like(log_ratio), log_ratio.detach())
    return TokenLoss(-torch.minimum(plain, clipped) * mask, ((clipped < plain) & mask).float(), kl)


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    """Returns -A log pi(t) (Williams, 1992): the policy gradient without a ratio, for one update a rollout batch.

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`; the old ones serve for the estimate of the divergence alone.
    """
    own = torch.where(mask, logprobs, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return TokenLoss(-own * advantages, torch.zeros_like(log_ratio).detach(), k3(torch.zeros_like(log_ratio), log_ratio.detach()))


# ---- aggregation: lengths [n] int64 of a minibatch's rollouts -> weights [n]; the loss is the sum of weight times the sum over tokens


def token_mean(lengths: Tensor) -> Tensor:
    """Returns 1 / (all tokens): the mean over tokens, in which long rationales weigh more (DAPO, Yu et al., arXiv 2503.14476, eq. 8)."""
    return torch.ones(lengths.shape, device=lengths.device) / lengths.sum().clamp(min=1)


def sequence_mean(lengths: Tensor) -> Tensor:
    """Returns 1 / (n |o_i|): the mean over rollouts of the mean over tokens (GRPO, Shao et al., arXiv 2402.03300, eq. 3).

    A token of a long rationale weighs less than one of a short rationale.
    """
    return 1.0 / (lengths.clamp(min=1) * len(lengths))


def constant(lengths: Tensor, *, tokens: int) -> Tensor:
    """Returns 1 / (n tokens): sums over tokens, divided by a constant (Dr. GRPO, Liu et al., arXiv 2503.20783).

    The mean over rollouts of their log-probabilities (RLOO, ReMax) is this one times `tokens`, which keeps gradients on the scale of the
    other aggregations.

    Args:
        lengths: [n] int64.
        tokens: the constant, such as the length limit.
    """
    return torch.full(lengths.shape, 1.0 / (len(lengths) * tokens), device=lengths.device)


# ---- correction for an engine whose log-probs are not the trainer's


@torch.no_grad()
def truncated_importance_weights(trainer: Tensor, engine: Tensor, mask: Tensor, cap: float, level: Level = "token") -> Tensor:
    """Returns truncated importance weights: min(pi_trainer / pi_engine, cap) of the sampled tokens, without gradient.

    Rollouts come from the engine's distribution and the gradient is taken under the trainer's; the weight corrects for this, and the cap
    bounds its variance (Ionides, Truncated Importance Sampling, 2008; for engines of lower precision Yao
    et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025).

    Args:
        trainer, engine: [N, T] float32 log-probs of one and the same policy, at the moment of sampling.
        mask: [N, T] bool, True on sampled tokens.
        cap: greatest weight.
        level: `token`, each token by its own ratio (biased, low variance); `sequence`, all tokens of a rollout by the
            product of their ratios.

    Returns:
        [N, T] float32, 0 where the mask is False.
    """
    log_ratio = torch.where(mask, trainer - engine, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    return log_ratio.exp().clamp(max=cap) * mask
