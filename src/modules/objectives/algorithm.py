"""A policy-gradient algorithm: functions and numbers, put together by a file in configs/algorithm."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from src.modules.objectives.losses import (
    ESTIMATORS,
    OFF_POLICY_FORMS,
    Correction,
    Estimator,
    Level,
    TokenLoss,
    entropy_loss,
    importance_weights,
    paired_divergence,
    token_mean,
)
from src.modules.types import Reward

Penalty = Literal["relative", "constant", "mask", "none"]
"""What is done to a rollout that the length limit cut before EOS; see shaping.truncated_reward."""
KLPlace = Literal["loss", "reward", "pairs"]

TIS_CAP = 3.0
"""The value of `tis_cap=auto` for an engine that is not exact."""


@dataclass(frozen=True)
class Algorithm:
    """An advantage, a loss, the sum over its tokens, the number of optimiser steps a rollout batch, and options.

    Attributes:
        advantage: (rewards [B, K], keep [B, K] bool) -> advantages [B, K]; with `greedy_baseline` a third argument, the rewards of the
            greedy rollouts [B].
        term_advantage: a function like `advantage`, which each term of the reward passes through before they are weighted and summed
            (GDPO, Liu et al., arXiv 2601.05242: standardised within its group); None: the reward's total as it is.
        loss: (logprobs [N, T], old_logprobs [N, T], advantages [N, T], mask [N, T]) -> TokenLoss.
        aggregation: (lengths [n] of a minibatch's rollouts) -> weight of each rollout's tokens [n].
        updates_per_batch: optimiser steps a rollout batch, each on its share of the groups; 1 is on-policy.
        truncation, truncation_size: `penalty` and `size` of shaping.truncated_reward.
        gae_lambda: None gives every token its rationale's advantage, as published; 0 to 1 gives each the advantage of what the reward
            gains from it on (see credit.token_returns).
        overlong: (lengths [B, K]) -> what is added to the rewards [B, K], such as shaping.soft_overlong.
        token_cost: subtracted from the reward for each token of a rationale, which then is only as long as it helps.
        greedy_baseline: sample one more, greedy rollout of each text, whose reward is the baseline.
        min_group_std, max_extra_batches: dynamic sampling; see training/dynamic_sampling.py.
        kl_coef: weight of the divergence from the reference, the policy as training began; 0 keeps no reference in memory.
        kl_estimator: k1, k2 or k3 of losses.py.
        kl_in: `loss`, token by token; `reward`, the sum over a rollout's tokens is subtracted from its reward, after the truncation
            penalty (with `gae_lambda` each token's own part is subtracted from what it gained); `pairs`, the present policy's log-ratio,
            compared within groups (see losses.paired_divergence).
        entropy_coef: weight of the entropy of each token's distribution, which is raised; see losses.entropy_loss.
        tis_cap, tis_floor, tis_level, tis_mode: see losses.importance_weights. A cap of None is no correction; `auto` is none for an exact
            engine and TIS_CAP for another (see `for_engine`). With a correction the old log-probs of the loss are the trainer's own, and
            else the engine's if it reports them.

    Raises:
        ValueError: a number or a name out of range, or functions and settings that do not go together.
    """

    advantage: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
    aggregation: Callable[[Tensor], Tensor] = token_mean
    term_advantage: Callable[[Tensor, Tensor], Tensor] | None = None
    updates_per_batch: int = 1
    truncation: Penalty = "relative"
    truncation_size: float = 1.0
    gae_lambda: float | None = None
    overlong: Callable[[Tensor], Tensor] | None = None
    token_cost: float = 0.0
    greedy_baseline: bool = False
    min_group_std: float = 0.0
    max_extra_batches: int = 0
    kl_coef: float = 0.0
    kl_estimator: Estimator = "k3"
    kl_in: KLPlace = "loss"
    entropy_coef: float = 0.0
    tis_cap: float | Literal["auto"] | None = None
    tis_floor: float = 0.0
    tis_level: Level = "token"
    tis_mode: Correction = "truncate"

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
        if self.term_advantage is not None and (self.greedy_baseline or self.gae_lambda is not None):
            raise ValueError(
                "algorithm.term_advantage compares the terms of whole rationales within groups: it goes with neither "
                "algorithm.greedy_baseline=true nor algorithm.gae_lambda; set them to false and null"
            )
        for name in ("min_group_std", "max_extra_batches", "kl_coef", "entropy_coef", "tis_floor", "token_cost"):
            if getattr(self, name) < 0:
                raise ValueError(f"algorithm.{name}={getattr(self, name)}: it must be at least 0")
        if self.tis_cap not in (None, "auto") and not (isinstance(self.tis_cap, int | float) and self.tis_cap > self.tis_floor):
            raise ValueError(
                f"algorithm.tis_cap={self.tis_cap}: it must be above algorithm.tis_floor={self.tis_floor}, or null (no correction), or auto"
            )
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
            "kl_in": get_args(KLPlace),
            "tis_level": get_args(Level),
            "tis_mode": get_args(Correction),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"algorithm.{name}={getattr(self, name)!r}: it is {' or '.join(allowed)}")
        if self.kl_coef and self.kl_estimator == "k1" and self.kl_in == "loss":
            raise ValueError("algorithm.kl_estimator=k1 in the loss has a mean gradient of 0: use k2 or k3, or algorithm.kl_in=reward")
        if self.kl_in == "pairs" and self.truncation == "mask":
            raise ValueError(
                "algorithm.kl_in=pairs compares all rollouts of a text, and algorithm.truncation=mask leaves some out: use another"
            )
        if self.kl_in == "pairs" and self.kl_estimator != "k1":
            raise ValueError(
                f"algorithm.kl_in=pairs compares log-ratios, and algorithm.kl_estimator={self.kl_estimator} is another: use k1"
            )

    def for_engine(self, exact: bool) -> "Algorithm":
        """Returns the algorithm with `tis_cap=auto` decided for an engine."""
        return replace(self, tis_cap=None if exact else TIS_CAP) if self.tis_cap == "auto" else self

    def remarks(self) -> list[str]:
        """Returns lines for the log: what of the algorithm has no effect, and what was decided for it."""
        found, loss = [], getattr(self.loss, "func", self.loss)
        if self.updates_per_batch == 1 and loss in OFF_POLICY_FORMS:
            found.append(
                f"algorithm.updates_per_batch=1: the only update is on-policy, where the loss {loss.__name__} has the gradient of ppo_clip"
            )
        if self.tis_cap is not None:
            found.append(
                f"gradients are weighted by importance ratios of trainer and engine (algorithm.tis_cap={self.tis_cap:g}, "
                f"tis_mode={self.tis_mode}); algorithm.tis_cap=null switches this off"
            )
        return found

    def scores(self, reward: Reward, finished: Tensor) -> Tensor:
        """Returns [B, K] float32, what is shaped and compared: the reward's total, or the weighted sum of what `term_advantage` makes of
        its terms. With `truncation: mask` rollouts that are not `finished` ([B, K] bool) have no part in it."""
        if self.term_advantage is None:
            return reward.total
        keep = finished if self.truncation == "mask" else torch.ones_like(finished)
        return torch.stack([reward.weights[name] * self.term_advantage(term, keep) for name, term in reward.terms.items()]).sum(dim=0)

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def _regulariser(self, logprobs: Tensor, reference: Tensor, mask: Tensor, groups: Tensor | None) -> Tensor:
        if self.kl_in == "loss":
            return self.divergence(logprobs, reference, mask)
        if groups is None:
            raise ValueError("algorithm.kl_in=pairs needs to know which rollouts are of one text")
        return paired_divergence(logprobs, reference, mask, groups)

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
        entropy: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> TokenLoss:
        """Returns the loss with importance weights, the divergence from the reference and entropy, as far as the algorithm has them.

        Args:
            logprobs, old_logprobs, advantages, mask: of `loss`.
            reference: [N, T] log-probs under the reference, for the divergence in the loss.
            engine: [N, T] log-probs of the engine that sampled, for importance weights.
            entropy: [N, T] of the tokens' distributions, for the entropy.
            groups: [N] int64, equal for rollouts of one text, which are all there; for the divergence in pairs.

        Raises:
            ValueError: the algorithm needs one of these and it is None.
        """
        plain = self.loss(logprobs, old_logprobs, advantages, mask)
        loss = plain.loss
        if self.tis_cap is not None:
            if engine is None:
                raise ValueError("algorithm.tis_cap needs the engine's log-probs, and this engine does not say them; set it to null")
            cap = float(self.tis_cap)
            loss = loss * importance_weights(old_logprobs, engine, mask, cap, self.tis_floor, self.tis_level, self.tis_mode)
        if self.kl_coef and self.kl_in != "reward":
            if reference is None:
                raise ValueError(f"algorithm.kl_coef={self.kl_coef} needs log-probs of the reference")
            loss = loss + self.kl_coef * self._regulariser(logprobs, reference, mask, groups)
        if self.entropy_coef:
            if entropy is None:
                raise ValueError(f"algorithm.entropy_coef={self.entropy_coef} needs the entropies of the tokens' distributions")
            loss = loss + self.entropy_coef * entropy_loss(logprobs, old_logprobs, entropy, mask)
        return TokenLoss(loss, plain.clipped, plain.kl)
