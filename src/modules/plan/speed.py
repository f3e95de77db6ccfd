"""The floor below the time of a rollout batch: its arithmetic and its reading at a device's rates; pure arithmetic, never reached.

Counted are matrix products, attention and the output layer, of memory the weights and the keys and values; every prompt once for all its
rationales. Not counted are embedding (rollout=hf has the states), evaluation, what ranks exchange and kernel launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.modules.plan.memory import Shape


@dataclass(frozen=True)
class Card:
    """A device's rates, of its maker's data sheet, without sparsity.

    Attributes:
        name: in words.
        half, single: operations a second of matrix products in bfloat16 and in float32 (without TF32).
        bandwidth: bytes a second of its memory.
    """

    name: str
    half: float
    single: float
    bandwidth: float


CARDS = {
    "h100": Card("NVIDIA H100", 989e12, 67e12, 3.35e12),
    "h200": Card("NVIDIA H200", 989e12, 67e12, 4.8e12),
    "a100": Card("NVIDIA A100", 312e12, 19.5e12, 2.04e12),
    "l40s": Card("NVIDIA L40S", 362e12, 91.6e12, 0.864e12),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 165e12, 82.6e12, 1.01e12),
}
"""By the value of plan.card; the H100 and the A100 in their largest versions (SXM, 80 GB)."""


def find_card(name: str | None) -> Card | None:
    """Returns the card of this name, or (None) that of this machine; None if it has none of those in the table.

    Raises:
        ValueError: no such card.
    """
    if name is not None:
        if name not in CARDS:
            raise ValueError(f"plan.card={name} is not known: it is {', '.join(CARDS)}, or null for the card of this machine")
        return CARDS[name]
    here = torch.cuda.get_device_name().replace(" ", "").lower() if torch.cuda.is_available() else ""
    return next((card for key, card in CARDS.items() if key in here), None)


@dataclass(frozen=True)
class Phase:
    """A part of a rollout batch: its name, its operations, and the bytes that are read or written."""

    what: str
    flops: float
    bytes: float

    def seconds(self, card: Card, half: bool) -> float:
        """Returns the longer of its arithmetic and its reading."""
        return max(self.flops / (card.half if half else card.single), self.bytes / card.bandwidth)


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """Returns (inputs, outputs) of every matrix of a layer."""
    d, heads, kv, inner = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    return [(d, heads), (d, kv), (d, kv), (heads, d), (d, inner), (d, inner), (inner, d)]


def _weights(shape: Shape) -> int:
    return shape.layers * sum(i * o for i, o in matrices(shape))


def _pair(shape: Shape) -> int:
    """Returns operations of a token's attention to one other, in all layers."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def reading(shape: Shape, prompts: Sequence[float], width: int) -> Phase:
    """Returns the reading of prompts of these lengths; `width` is the bytes of a number."""
    flops = 2 * _weights(shape) * sum(prompts) + _pair(shape) * sum(p * (p + 1) / 2 for p in prompts)
    return Phase("reading the prompts", flops, width * _weights(shape))


def writing(shape: Shape, prompts: Sequence[float], n: int, rationale: float, width: int) -> Phase:
    """Returns the writing of n rationales of `rationale` tokens for each prompt, all at once: a step reads the weights once."""
    rows, head = len(prompts) * n, shape.vocabulary * shape.hidden
    own = rows * rationale * (rationale + 1) / 2
    flops = 2 * (_weights(shape) + head) * rows * rationale + _pair(shape) * (n * rationale * sum(prompts) + own)
    kept = 2 * shape.layers * shape.kv_heads * shape.head_dim  # numbers kept of a token
    return Phase("writing the rationales", flops, width * (rationale * (_weights(shape) + head) + kept * (rationale * sum(prompts) + own)))


def forward(shape: Shape, prompts: Sequence[float], n: int, rationale: float, width: int) -> Phase:
    """Returns one pass over the same sequences, with the log-probs of the rationales' tokens."""
    read, written = reading(shape, prompts, width), writing(shape, prompts, n, rationale, width)
    return Phase("a pass", read.flops + written.flops, read.bytes + width * shape.vocabulary * shape.hidden)


def updating(shape: Shape, passes: Sequence[Phase], updates: int, checkpointing: bool) -> Phase:
    """Returns forward and backward passes, and AdamW's steps in float32.

    The backward pass has as many operations as the forward pass for the states, and as many again for weights that are trained.
    """
    times = 2 + checkpointing + shape.trained / shape.parameters
    moved = 28 * shape.trained  # reads weight, gradient and two moments, and writes all but the gradient
    return Phase("updating", times * sum(p.flops for p in passes), times * sum(p.bytes for p in passes) + updates * moved)


def batch_phases(
    shape: Shape,
    prompts: Sequence[float],
    k: int,
    context: Sequence[float],
    rationale: float,
    half: bool,
    updates: int = 1,
    checkpointing: bool = False,
    reference: bool = False,
    pathwise: bool = False,
) -> list[Phase]:
    """Returns the phases of a rollout batch on one device.

    Args:
        prompts: lengths of the prompts that have `k` rollouts.
        context: of those that have one.
        rationale: tokens of a rationale.
        half: whether arithmetic is in bfloat16.
        updates: optimiser steps.
        checkpointing: whether activations are computed again.
        reference: whether a second policy scores the rationales.
        pathwise: whether the texts of `context` take part in the update.
    """
    width = 2 if half else 4
    read = reading(shape, [*prompts, *context], width)
    many, few = (writing(shape, texts, n, rationale, width) for texts, n in ((prompts, k), (context, 1)))
    # rationales of both kinds can be written in the same steps, which read the weights once
    once = width * rationale * (_weights(shape) + shape.vocabulary * shape.hidden)
    written = Phase(many.what, many.flops + few.flops, many.bytes + few.bytes - once)
    passes = [forward(shape, prompts, k, rationale, width)]
    scored = [Phase("scoring by the reference", passes[0].flops, passes[0].bytes)] if reference else []
    if pathwise and context:
        passes.append(forward(shape, context, 1, rationale, width))
    return [read, written, *scored, updating(shape, passes, updates, checkpointing)]
