"""The parts of a policy-gradient loss: token losses, sums over tokens, divergence, entropy, importance weights.

Pure functions on log-probs [N, T] and lengths [n].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
Correction = Literal["truncate", "mask"]

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


def paired_divergence(logprobs: Tensor, reference: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Returns a loss whose gradient draws pairs of rollouts of one text to equal log-ratios (CoPG, Flet-Berliac et al., arXiv 2406.19185).

    With D[k] = log pi(y_k) / pi_ref(y_k) of the present policy, held constant, it is (D[k] - mean_{l != k} D[l]) log pi(y_k). With the
    leave-one-out rewards R[k] of `advantages.rloo` and `reinforce` it makes up the gradient of CoPG over all pairs of a group:
    -(R[k] - b D[k] - mean_l (R[l] - b D[l])) grad log pi(y_k). It needs no importance ratio: at the optimum R - b D is one number
    for all rollouts of a text, whatever policy wrote them.

    Args:
        logprobs, reference, mask: [N, T].
        groups: [N], a number for each text; all its rollouts are there.

    Returns:
        [N, T], 0 where masked; 0 for a rollout without others.
    """
    own = torch.where(mask, logprobs, 0.0)
    distance = (own - torch.where(mask, reference, 0.0)).detach().sum(dim=1)
    same = groups.unsqueeze(1) == groups.unsqueeze(0)
    others = same.sum(dim=1) - 1
    mean_of_others = ((same * distance).sum(dim=1) - distance) / others.clamp(min=1)
    return torch.where(others > 0, distance - mean_of_others, 0.0).unsqueeze(1) * own


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


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns log r_t, [N, T], 0 where masked, bounded to [-20, 20] nats: r overflows. Beyond the bound its gradient is 0."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20.0, 20.0)


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> TokenLoss:
    """Returns the clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7): -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A).

    r_t = exp(logprobs - old_logprobs), see `_log_ratio`. If the two are equal (one update a rollout batch) its gradient is that of
    -A log pi(t), GRACE's form. Different clips are DAPO's (arXiv 2503.14476, eq. 10): a larger clip_high lets unlikely tokens rise.

    Args:
        logprobs, old_logprobs: [N, T] float32 of the current and of the sampling policy.
        advantages: [N, T] float32.
        mask: [N, T] bool, True on the tokens that count.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    return _clipped(log_ratio.exp(), log_ratio, advantages, mask, clip_low, clip_high)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> TokenLoss:
    """Returns the clipped surrogate with one ratio for all tokens of a rollout (GSPO, Zheng et al., arXiv 2507.18071, section 4).

    s_i = exp(mean_t log r_t) takes the place of r_t. A token's own log-prob carries the gradient (GSPO-token, section 4.3), which is the
    same where a rollout's tokens have one advantage. With `sequence_mean` it is the paper's objective, whose clips are the defaults here.

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    mean = log_ratio.detach().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return _clipped((mean + log_ratio - log_ratio.detach()).exp(), log_ratio, advantages, mask, clip_low, clip_high)


def _clipped(ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> TokenLoss:
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(-torch.minimum(plain, clipped) * mask, ((clipped < plain) & mask).float(), _kl_of(log_ratio))


def _kl_of(log_ratio: Tensor) -> Tensor:
    return k3(torch.zeros_like(log_ratio), log_ratio.detach())


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> TokenLoss:
    """Returns -w_t A log pi(t) with w_t = clip(r_t, 1 - clip_low, 1 + clip_high), held constant (CISPO, arXiv 2506.13585, eq. 4 and 5).

    No token loses its gradient, as one that `ppo_clip` cuts does. The paper has no lower bound (clip_low=1).

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * advantages * torch.where(mask, logprobs, 0.0)
    return TokenLoss(loss, ((weight != ratio) & mask).float(), _kl_of(log_ratio))


def sapo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> TokenLoss:
    """Returns -f(r_t) A with the soft gate f(r) = 4 / tau sigmoid(tau (r - 1)) (SAPO, Gao et al., arXiv 2511.20347).

    The gradient fades with the distance of r from 1, where its factor is 1.

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`.
        tau_positive, tau_negative: tau for advantages above 0, and for the others; a larger one fades sooner.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    return TokenLoss(-gate * advantages * mask, torch.zeros_like(log_ratio).detach(), _kl_of(log_ratio))


OFF_POLICY_FORMS: tuple[Callable[..., TokenLoss], ...] = (gspo, cispo, sapo)
"""Losses whose gradient is that of `ppo_clip` while the policy is the one that sampled."""


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    """Returns -A log pi(t) (Williams, 1992): the policy gradient without a ratio, for one update a rollout batch.

    Args:
        logprobs, old_logprobs, advantages, mask: as in `ppo_clip`; the old ones serve for the estimate of the divergence alone.
    """
    own = torch.where(mask, logprobs, 0.0)
    return TokenLoss(-own * advantages, torch.zeros_like(own).detach(), _kl_of(_log_ratio(logprobs, old_logprobs, mask)))


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


# ---- entropy


def entropy_loss(logprobs: Tensor, old_logprobs: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
    """Returns minus the entropy H of each token's distribution, [N, T], 0 where masked, with an estimate of its gradient.

    grad H = -E[(log pi(t) + H) grad log pi(t)] over t drawn from pi (H, a baseline, has no mean effect): the sampled token's term of it,
    times r_t = pi(t) / pi_old(t), held constant. It is unbiased and costs nothing; the exact gradient would take another product with
    the output embeddings. How a token changes the entropies after it is left out, as usual.

    Args:
        logprobs, old_logprobs, mask: as in `ppo_clip`.
        entropy: [N, T] float32 nats, without gradient.
    """
    own = torch.where(mask, logprobs, 0.0)
    ratio = _log_ratio(logprobs, old_logprobs, mask).detach().exp()
    weight = ratio * (own.detach() + entropy.detach())
    return (weight * (own - own.detach()) - entropy.detach()) * mask


# ---- correction for an engine whose log-probs are not the trainer's


@torch.no_grad()
def importance_weights(
    trainer: Tensor,
    engine: Tensor,
    mask: Tensor,
    cap: float,
    floor: float = 0.0,
    level: Level = "token",
    mode: Correction = "truncate",
) -> Tensor:
    """Returns importance weights pi_trainer / pi_engine of the sampled tokens, bounded, without gradient.

    Rollouts come from the engine's distribution and the gradient is taken under the trainer's; the weight corrects for this, and the bounds
    limit its variance (Ionides, Truncated Importance Sampling, 2008; for engines of lower precision Yao
    et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025). Masked: ratios outside the bounds are taken for
    errors and their tokens or rollouts left out (masked importance sampling; IcePop, with bounds 0.5 and 5).

    Args:
        trainer, engine: [N, T] float32 log-probs of one and the same policy, at the moment of sampling.
        mask: [N, T] bool, True on sampled tokens.
        cap, floor: greatest and least ratio.
        mode: what is done with a ratio outside: `truncate` to the bound, or `mask`, weight 0.
        level: `token`, each token by its own ratio (biased, low variance); `sequence`, all tokens of a rollout by the
            product of their ratios.

    Returns:
        [N, T] float32, 0 where the mask is False.
    """
    log_ratio = torch.where(mask, trainer - engine, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    ratio = log_ratio.exp()
    inside = (ratio >= floor) & (ratio <= cap)
    return torch.where(inside, ratio, 0.0) * mask if mode == "mask" else ratio.clamp(floor, cap) * mask
