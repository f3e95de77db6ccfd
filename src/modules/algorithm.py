"""What a policy-gradient algorithm is here: functions and numbers, put together by a config."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from src.modules.losses import TokenLoss
from src.modules.truncation import Penalty


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient algorithm: which advantage, which loss, how many steps.

    Attributes:
        advantage: (rewards [B, K], keep [B, K] bool) -> advantages [B, K].
        loss: (logprobs [N, T], old_logprobs [N, T], advantages [N, T], mask [N, T]) -> sums over tokens.
        updates_per_batch: optimiser steps a rollout batch, each on its share of the instances; 1 is purely on-policy.
        truncation, truncation_size: see `penalise_truncated`.
        credit_decay: None gives every token its rationale's advantage, as published; a number from 0 to 1 gives each the
            advantage of what the reward gained from it on (see `token_returns`).
    """

    advantage: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
    updates_per_batch: int = 1
    truncation: Penalty = "relative"
    truncation_size: float = 1.0
    credit_decay: float | None = None

    def __post_init__(self) -> None:
        if self.updates_per_batch < 1:
            raise ValueError(f"algorithm.updates_per_batch={self.updates_per_batch}: it must be at least 1")
        if self.credit_decay is not None and not 0 <= self.credit_decay <= 1:
            raise ValueError(f"algorithm.credit_decay={self.credit_decay}: it is null, or a number from 0 to 1")
