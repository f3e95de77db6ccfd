"""How far the engine that sampled stands from the policy that is trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.distributed.ranks import Ranks


@dataclass
class LogprobMismatch:
    """Absolute differences between an engine's log-probs of sampled tokens and the trainer's, in nats, added up part by part.

    Rounding leaves some 1e-5 in float32 and a few hundredths in bfloat16; a stale copy of the weights shows as far more.

    Attributes:
        tokens: how many were compared.
        total: sum of the differences.
        largest: the largest; nan before any.
    """

    tokens: int = 0
    total: float = 0.0
    largest: float = math.nan

    @property
    def mean(self) -> float:
        """Nats a token; nan where nothing was compared."""
        return self.total / self.tokens if self.tokens else math.nan

    def add(self, trainer: Tensor, engine: Tensor | None, mask: Tensor) -> None:
        """Takes in [N, T] log-probs of both where `mask` is True; nothing where the engine does not say."""
        if engine is None or not mask.any():
            return
        with torch.no_grad():
            gaps = (trainer - engine).abs()[mask]
        self.tokens += len(gaps)
        self.total += float(gaps.sum())
        largest = float(gaps.max())
        self.largest = largest if math.isnan(self.largest) else max(self.largest, largest)

    def over(self, ranks: Ranks) -> tuple[float, float]:
        """The mean and the largest over the tokens of all ranks; nan where nothing was compared."""
        tokens, total = ranks.total(self.tokens, self.total)
        largest = ranks.largest(-1.0 if math.isnan(self.largest) else self.largest)[0]  # a difference is never negative
        return (total / tokens, largest) if tokens else (math.nan, math.nan)
