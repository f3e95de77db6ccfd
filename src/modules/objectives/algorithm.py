"""What a policy-gradient algorithm is here: functions and numbers, put together by a config."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from src.modules.objectives.aggregation import token_mean
from src.modules.objectives.importance import Level, truncated_importance_weights
from src.modules.objectives.kl import ESTIMATORS, Estimator
from src.modules.objectives.losses import TokenLoss
from src.modules.objectives.truncation import Penalty, penalise_truncated


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient algorithm: which advantage, which loss, how its tokens are summed, how many steps.

    Attributes:
        advantage: (rewards [B, K], keep [B, K] bool) -> advantages [B, K]; with `greedy_baseline` a third argument, the
            greedy rollouts' rewards [B].
        loss: (logprobs [N, T], old_logprobs [N, T], advantages [N, T], mask [N, T]) -> TokenLoss.
        aggregation: (lengths [n] of a minibatch's rollouts) -> weight of each rollout's tokens [n].
        updates_per_batch: optimiser steps a rollout batch, each on its share of the instances; 1 is purely on-policy.
        truncation, truncation_size: see `penalise_truncated`.
        gae_lambda: None gives every token its rationale's advantage, as published; a number from 0 to 1 gives each the
            advantage of what the reward gained from it on (see `token_returns`).
        overlong: (lengths [B, K]) -> what is added to the rewards [B, K], such as `soft_overlong`.
        greedy_baseline: one greedy rollout more for each positive, scored for the advantage alone.
        min_group_std, max_extra_batches: see `GroupBuffer`.
        kl_coef: of the divergence from the reference, the policy as training began; 0 keeps no reference in memory.
        kl_estimator: see src/modules/objectives/kl.py.
        kl_in: `loss`, token by token; `reward`, the sum over a rollout's tokens is taken off its reward, whatever truncation made of
            that; with `gae_lambda` each token's own is taken off what it earned.
        tis_cap, tis_level: see `truncated_importance_weights`; None leaves it out, as where engine and trainer agree.
            The old log-probs of the loss are then the trainer's own, as they are wherever the engine gives no embeddings and so
            a pass is made; else they are the engine's.

    Raises:
        ValueError: a number or a name without sense, or an advantage function that `greedy_baseline` gives too much or too little.
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
                f"algorithm.gae_lambda={self.gae_lambda} judges each token by what the reward gains from it on, and has no use for "
                "algorithm.greedy_baseline=true: set gae_lambda to null (ReMax as published)"
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
            raise ValueError(
                "algorithm.kl_estimator=k1 in the loss pushes nowhere: the mean of its gradient is 0. Use k2 or k3, or kl_in=reward"
            )

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def judged(self, rewards: Tensor, lengths: Tensor, finished: Tensor, divergence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rewards as the advantage sees them, [B, K], and which rollouts count, [B, K] bool.

        Args:
            rewards, lengths, finished: [B, K] float32, int64 and bool.
            divergence: [B, K] float32, from the reference, summed over each rollout's tokens; None takes nothing off.
        """
        if self.overlong is not None:
            rewards = rewards + self.overlong(lengths)
        rewards, keep = penalise_truncated(rewards, finished, self.truncation, self.truncation_size)
        # last: a rationale that met the limit is charged for its distance like any other
        return rewards if divergence is None else rewards - self.kl_coef * divergence, keep

    def divergence(self, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """[N, T] float32: estimates of the divergence from the reference by token, from log-probs [N, T] of both; 0 where masked."""
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
        """The loss with what is put on it: importance weights on the policy gradient, and the divergence from the reference.

        Args:
            logprobs, old_logprobs, advantages, mask: of `loss`.
            reference: [N, T] log-probs under the reference, for the divergence in the loss.
            engine: [N, T] log-probs by the engine that sampled, for importance weights.

        Raises:
            ValueError: what this algorithm needs of the two is not there.
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
