"""The gradient of a loss over all embeddings of a batch, in the memory of a part of it (GradCache, arXiv 2101.06983).

All parts are embedded without a graph; the loss and its gradient are taken at the embeddings; each part is embedded again with a graph,
and its share of that gradient is sent back through it. The second pass of a part draws the random numbers (dropout) of its first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


@dataclass(frozen=True)
class RandomState:
    """States of torch's generators: the CPU's, and the GPU's if it computes."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Returns the present states."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws, while in force, the numbers that followed this state; restores the generators afterwards."""
        with torch.random.fork_rng([] if self.gpu is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def cached_gradient(
    embed: Callable[[Part], Tensor],
    parts: Sequence[Part],
    loss: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradient of `loss` over all parts together, with the graph of one part in memory at a time.

    A single part takes one pass.

    Args:
        embed: a part -> its [n_i, D] embeddings; it may draw from torch's generators.
        parts: at least one.
        loss: [N, D] of all parts, in their order, to a scalar.
        backward: takes a scalar and accumulates its gradient.
        device: of the embeddings.

    Returns:
        The loss and the [N, D] embeddings, detached.
    """
    if len(parts) == 1:
        embeddings = embed(parts[0])
        value = loss(embeddings)
        backward(value)
        return value.detach(), embeddings.detach()
    states, embedded = [], []
    with torch.no_grad():
        for part in parts:
            states.append(RandomState.now(device))
            embedded.append(embed(part))
    embeddings = torch.cat(embedded).requires_grad_()
    value = loss(embeddings)
    (gradient,) = torch.autograd.grad(value, embeddings)
    for part, state, share in zip(parts, states, gradient.split([len(rows) for rows in embedded]), strict=True):
        with state.again():
            backward((embed(part) * share).sum())  # whose gradient at the embeddings is `share`
    return value.detach(), embeddings.detach()
