"""Pooling of hidden states into text embeddings: of complete texts, or token by token while a rationale is written.

A mask selects the pooled tokens, so either padding side will do. GRACE selects the text, the template's tokens after it, and
the rationale; `eos` takes the last of these: EOS, or the last token of a truncated rationale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.modules.types import Rollouts

PoolingName = Literal["mean", "eos", "max"]


@dataclass(frozen=True)
class Pooling:
    """One way to make a vector of many.

    Attributes:
        begin: ([N, T, D], [N, T] bool) -> [N, D] float32 of what the mask selects.
        extend: ([N, D] so far, [N, D] of one more token) -> [N, D].
        running: ([N, T, D], [N, T] bool) -> [N, T, D] float32, at each selected position `begin` of what is selected up to it.
        divide: divides by the number of tokens at the end.
    """

    begin: Callable[[Tensor, Tensor], Tensor]
    extend: Callable[[Tensor, Tensor], Tensor]
    running: Callable[[Tensor, Tensor], Tensor]
    divide: bool = False

    def finish(self, pooled: Tensor, counts: Tensor) -> Tensor:
        """Returns [..., D] embeddings, not normalised; `counts`, [...] int64, is the number of tokens that went into each."""
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


def check_pooling(pooling: str, layer: int, where: str) -> None:
    """Raises ValueError, with `where` in its text, if the pooling is not in POOLINGS or the layer is neither -1 nor -2."""
    if pooling not in POOLINGS:
        raise ValueError(f"{where}: pooling={pooling!r} does not exist; it is {', '.join(POOLINGS)}")
    if layer not in (-1, -2):
        raise ValueError(f"{where}: layer={layer}; it is -1 (the last) or -2 (the one before)")


def pool(hidden: Tensor, mask: Tensor, pooling: PoolingName = "mean") -> Tensor:
    """Pools the states that a mask selects into one vector a row.

    Args:
        hidden: [N, T, D] any floating dtype; sums are in float32.
        mask: [N, T] bool.
        pooling: `mean` (GRACE), `eos` or `max` (coordinate by coordinate).

    Returns:
        [N, D] float32, not normalised.

    Raises:
        ValueError: a row selects no token.
    """
    counts = mask.sum(dim=1)
    if not bool((counts > 0).all()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"embedding of zero tokens in rows {empty}: the pooling mask selects nothing there")
    return POOLINGS[pooling].finish(POOLINGS[pooling].begin(hidden, mask), counts)


def pool_prefixes(hidden: Tensor, rollouts: Rollouts, steps: int, pooling: PoolingName = "mean") -> Tensor:
    """Returns the embeddings of each rationale cut after t tokens, t = 0 .. steps.

    Args:
        hidden: [N, T, D].
        rollouts: N of them.
        steps: R, at least the longest rationale's tokens.

    Returns:
        [N, R + 1, D] float32; past a rationale's end its last value.
    """
    mask = rollouts.pooling_mask
    # [N, R + 1], the last position that counts after t tokens
    last = (rollouts.prompt_lengths.unsqueeze(1) - 1 + torch.arange(steps + 1, device=hidden.device)).minimum(
        rollouts.lengths.unsqueeze(1) - 1
    )
    pooled = POOLINGS[pooling].running(hidden, mask).gather(1, last.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
    return POOLINGS[pooling].finish(pooled, mask.cumsum(dim=1).gather(1, last))


def states_at(backbone: nn.Module, layer: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Returns the [N, T, D] last hidden states (after the final norm) of a transformers backbone, and those of `layer`.

    Args:
        layer: -1, the last hidden states again; -2, the input of the last layer (before any final norm): transformers'
            `hidden_states[-2]`, without keeping the states of every layer.
        inputs: of the backbone.

    Raises:
        ValueError: layer -2 of a backbone without `layers`.
    """
    if layer == -1:
        last: Tensor = backbone(**inputs).last_hidden_state
        return last, last
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"policy.layer={layer}: {type(backbone).__name__} has no `layers` to look between; use policy.layer=-1")
    given: list[Tensor] = []
    hook = layers[layer + 1].register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        last = backbone(**inputs).last_hidden_state
    finally:
        hook.remove()
    return last, given[0]
