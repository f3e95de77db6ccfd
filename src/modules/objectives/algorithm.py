"""A policy-gradient algorithm: functions and numbers, put together by a file in configs/algorithm."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from src.modules.objectives.losses import ESTIMATORS, Estimator, Level, TokenLoss, token_mean, truncated_importance_weights

Penalty = Literal["relative", "constant", "mask", "none"]
"""The penalty of a rollout that met the length limit; see shaping.penalise_truncated."""


@dataclass(frozen=True)
class Algorithm:
    """An advantage, a loss, the sum over its tokens, the number of optimiser steps a rollout batch, and options.

    Attributes:
        advantage: (rewards [B, K], keep [B, K] bool) -> advantages [B, K]; with `greedy_baseline` a third argument, the rewards of the
            greedy rollouts [B].
        loss: (logprobs [N, T], old_logprobs [N, T], advantages [N, T], mask [N, T]) -> TokenLoss.
        aggregation: (lengths [n] of a minibatch's rollouts) -> weight of each rollout's tokens [n].
        updates_per_batch: optimiser steps a rollout batch, each on its share of the groups; 1 is on-policy.
        truncation, truncation_size: see shaping.penalise_truncated.
        gae_lambda: None gives every token its rationale's advantage, as published; 0 to 1 gives each the advantage of what the reward
            gains from it on (see credit.token_returns).
        overlong: (lengths [B, K]) -> what is added to the rewards [B, K], such as shaping.soft_overlong.
        greedy_baseline: sample one more, greedy rollout of each text, whose reward is the baseline.
        min_group_std, max_extra_batches: dynamic sampling; see training/dynamic_sampling.py.
        kl_coef: weight of the divergence from the reference, the policy as training began; 0 keeps no reference in memory.
        kl_estimator: k1, k2 or k3 of losses.py.
        kl_in: `loss`, token by token; `reward`, the sum over a rollout's tokens is subtracted from its reward after truncation; with
            `gae_lambda` each token's own part is subtracted from what it gained.
        tis_cap, tis_level: see losses.truncated_importance_weights; None for no correction, as for an exact engine. With a correction the
            old log-probs of the loss are the trainer's own, and else the engine's if it reports them.

    Raises:
        ValueError: a number or a name out of range, or an advantage function whose arguments do not fit `greedy_baseline`.
    """

    advantage: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
    aggregation: Callable[[Tensor], Tensor] = token_mean
    updates_per_batch: int = 1
    truncation: Penalty = "relative"
    truncation_size: float = 1.0
    gae_lambda: float | None = None
    overlong: Callable[[Tensor], Tensor] | None = None
    greedy_baseline: bool = False
    min_group_std: float = 0.0
    max_extra_batches: int = 0
    kl_coef: float = 0.0
    kl_estimator: Estimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    tis_cap: float | None = None
    tis_level: Level = "token"

    def __post_init__(self) -> None:
        if self.updates_per_batch < 1:
            raise ValueError(f"algorithm.updates_per_batch={self.updates_per_batch}: it must be at least 1")
        if self.gae_lambda is not None and not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"algorithm.gae_lambda={self.gae_lambda}: it is null, or a number from 0 to 1")
        if self.gae_lambda is not None and self.greedy_baseline:
            raise ValueError(
                f"algorithm.gae_lambda={self.gae_lambda} compares prefixes, and has no use for algorithm.greedy_baseline=true: set "
                "gae_lambda to null (ReMax as published)"
            )
        for name in ("min_group_std", "max_extra_batches", "kl_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"algorithm.{name}={getattr(self, name)}: it must be at least 0")
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"algorithm.tis_cap={self.tis_cap}: it must be above 0, or null for no correction")
        try:
            inspect.signature(self.advantage).bind(*[None] * (3 if self.greedy_baseline else 2))
        except TypeError as error:
            raise ValueError(
                f"algorithm.greedy_baseline={str(self.greedy_baseline).lower()} does not go with algorithm.advantage: with it the function "
                f"is given the greedy rollouts' rewards too, as remax takes them, and without it rewards and keep alone ({error})"
            ) from error
        choices = {
            "truncation": get_args(Penalty),
            "kl_estimator": tuple(ESTIMATORS),
            "kl_in": ("loss", "reward"),
            "tis_level": get_args(Level),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"algorithm.{name}={getattr(self, name)!r}: it is {' or '.join(allowed)}")
        if self.kl_coef and self.kl_estimator == "k1" and self.kl_in == "loss":
            raise ValueError("algorithm.kl_estimator=k1 in the loss has a mean gradient of 0: use k2 or k3, or algorithm.kl_in=reward")

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def divergence(self, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """Returns [N, T] float32, the divergence from the reference by token, from log-probs [N, T] of both; 0 where masked."""
        return ESTIMATORS[self.kl_estimator](torch.where(mask, logprobs, 0.0), torch.where(mask, reference, 0.0))

    def token_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        reference: Tensor | None = None,
        engine: Tensor | None = None,
    ) -> TokenLoss:
        """Returns the loss with importance weights and with the divergence from the reference, as far as the algorithm has them.

        Args:
            logprobs, old_logprobs, advantages, mask: of `loss`.
            reference: [N, T] log-probs under the reference, for the divergence in the loss.
            engine: [N, T] log-probs of the engine that sampled, for importance weights.

        Raises:
            ValueError: the algorithm needs one of the two and it is None.
        """
        plain = self.loss(logprobs, old_logprobs, advantages, mask)
        loss = plain.loss
        if self.tis_cap is not None:
            if engine is None:
                raise ValueError("algorithm.tis_cap needs the engine's log-probs, and this engine does not say them; set it to null")
            loss = loss * truncated_importance_weights(old_logprobs, engine, mask, self.tis_cap, self.tis_level)
        if self.kl_in_loss:
            if reference is None:
                raise ValueError(f"algorithm.kl_coef={self.kl_coef} needs log-probs of the reference")
            loss = loss + self.kl_coef * self.divergence(logprobs, reference, mask)
        return TokenLoss(loss, plain.clipped, plain.kl)
