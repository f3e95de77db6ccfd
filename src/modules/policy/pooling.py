"""Pooling of hidden states into text embeddings: of whole texts, or token by token while a rationale is written.

What is pooled is what a mask selects, so either padding side will do. GRACE selects the text, the template's tokens after
it, and the rationale; of these `eos` takes the last: EOS, or the last token where the rationale was truncated before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.modules.types import Rollouts

PoolingName = Literal["mean", "eos", "max"]


@dataclass(frozen=True)
class Pooling:
    """One way to make a vector of many.

    Attributes:
        begin: ([N, T, D], [N, T] bool) -> [N, D] float32 of what the mask selects.
        extend: ([N, D] so far, [N, D] of one token more) -> [N, D].
        running: ([N, T, D], [N, T] bool) -> [N, T, D] float32, at each selected position `begin` of what is selected up to it.
        divide: by the number of tokens at the end.
    """

    begin: Callable[[Tensor, Tensor], Tensor]
    extend: Callable[[Tensor, Tensor], Tensor]
    running: Callable[[Tensor, Tensor], Tensor]
    divide: bool = False

    def finish(self, pooled: Tensor, counts: Tensor) -> Tensor:
        """[..., D] embeddings, not normalised; `counts`, [...] int64, is how many tokens went into each."""
        return pooled / counts.unsqueeze(-1) if self.divide else pooled


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    # Not a matrix product: autocast would round its result to bfloat16, and embeddings differ by little within a group.
    return hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1, dtype=torch.float32)


def _running_sum(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask.unsqueeze(-1), 0.0).cumsum(dim=1, dtype=torch.float32)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1).float()


def _running_max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).cummax(dim=1).values.float()


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(dim=1)
    return hidden[torch.arange(len(last), device=mask.device), last].float()


POOLINGS: dict[str, Pooling] = {
    "mean": Pooling(_sum, torch.add, _running_sum, divide=True),
    "eos": Pooling(_last, lambda _, state: state, lambda hidden, _: hidden.float()),
    "max": Pooling(_max, torch.maximum, _running_max),
}


def pool(hidden: Tensor, mask: Tensor, pooling: PoolingName = "mean") -> Tensor:
    """One vector a row: the mean, the last or the greatest (coordinate by coordinate) of the states that the mask selects.

    Args:
        hidden: [N, T, D] any floating dtype; sums are in float32.
        mask: [N, T] bool, True where a token counts.
        pooling: `mean` (GRACE), `eos` or `max`.

    Returns:
        [N, D] float32, not normalised.

    Raises:
        ValueError: a row selects no token.
    """
    counts = mask.sum(dim=1)
    if not bool((counts > 0).all()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"embedding of zero tokens in rows {empty}: the pooling mask selects nothing there")
    way = POOLINGS[pooling]
    return way.finish(way.begin(hidden, mask), counts)


def pool_prefixes(hidden: Tensor, rollouts: Rollouts, steps: int, pooling: PoolingName = "mean") -> Tensor:
    """`pool` if each rationale were cut after t tokens, t = 0 .. steps.

    Args:
        hidden: [N, T, D].
        rollouts: N of them.
        steps: R, at least the longest rationale's tokens.

    Returns:
        [N, R + 1, D] float32; past a rationale's end what it ended with.
    """
    mask, way = rollouts.pooling_mask, POOLINGS[pooling]
    offsets = torch.arange(steps + 1, device=hidden.device)
    # the last position that counts after t tokens
    last = torch.minimum(rollouts.prompt_lengths.unsqueeze(1) - 1 + offsets, rollouts.lengths.unsqueeze(1) - 1)
    pooled = way.running(hidden, mask).gather(1, last.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
    return way.finish(pooled, mask.cumsum(dim=1).gather(1, last))
