"""The gradient of a loss over a whole batch of embeddings, in the memory of a part of it (GradCache, arXiv 2101.06983).

All parts are embedded without a graph; the loss and its gradient are taken at the embeddings; each part is embedded once
more, with a graph, and its share of that gradient sent back through it. Where the model draws random numbers (dropout), a
part's second pass draws those of its first: it would otherwise be another embedding than the one the gradient was taken at.
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
    """Where the generators of torch stand: the CPU's, and a GPU's where one computes."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """As it is."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """While in force, the numbers are drawn that were drawn from this state on; afterwards the generators are as before."""
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
    """Adds up the gradient of `loss` over all parts together, with the graph of one part in memory at a time.

    A single part takes one pass, and not two.

    Args:
        embed: a part to its [n_i, D] embeddings; it may draw random numbers, from torch's generators.
        parts: at least one.
        loss: [N, D] of all parts, in their order, to a scalar.
        backward: takes a scalar and adds its gradient up.
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


def parts_by_length(lengths: Tensor, tokens: int) -> list[Tensor]:
    """Cuts texts into parts of like lengths, each of at most `tokens` tokens with its padding; indices, [n_i] int64 each.

    A text that alone is longer stands alone.

    Args:
        lengths: [N] int64.
    """
    sizes = lengths.tolist()
    parts: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        if parts and (len(parts[-1]) + 1) * sizes[row] <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [torch.tensor(part) for part in parts]
