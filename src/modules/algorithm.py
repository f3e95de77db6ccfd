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
        loss: (logprobs [N, T], old_logprobs [N, T], advantages [N], mask [N, T]) -> sums over tokens.
        updates_per_batch: optimiser steps a rollout batch, each on its share of the instances; 1 is purely on-policy.
        truncation, truncation_size: see `penalise_truncated`.
    """

    advantage: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
    updates_per_batch: int = 1
    truncation: Penalty = "relative"
    truncation_size: float = 1.0

    def __post_init__(self) -> None:
        if self.updates_per_batch < 1:
            raise ValueError(f"algorithm.updates_per_batch={self.updates_per_batch}: it must be at least 1")
