"""Correction for an engine that samples from other log-probs than the trainer computes."""

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence"]


@torch.no_grad()
def truncated_importance_weights(trainer: Tensor, engine: Tensor, mask: Tensor, cap: float, level: Level = "token") -> Tensor:
    """Truncated importance weights: min(pi_trainer / pi_engine, cap) of the sampled tokens, without gradient.

    Rollouts come from the engine's distribution and the gradient is taken under the trainer's; the weight makes up for
    it, and the cap bounds its variance (Ionides, Truncated Importance Sampling, 2008; for engines of lower precision Yao
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
