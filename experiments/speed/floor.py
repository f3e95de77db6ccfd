"""This machine's rates, for the floor below times (src/modules/plan/speed.py): a card's from the table, else measured."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from src.modules.plan.memory import Shape
from src.modules.plan.speed import Card, find_card, matrices

_BYTES = 4  # of a float32


def _fastest(run: Callable[[], object], repeats: int = 20) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(shape: Shape, rows: int) -> float:
    """Floating-point operations a second of the model's own matrix products in float32, `rows` tokens at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds, flops = 0.0, 0.0
    sizes = [(size, shape.layers) for size in matrices(shape)] + [((shape.hidden, shape.vocabulary), 1)]
    for (inputs, outputs), times in sizes:
        x, w = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
        seconds += times * _fastest(lambda x=x, w=w: F.linear(x, w))
        flops += times * 2 * rows * inputs * outputs
    return flops / seconds


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(64 * 2**20 // _BYTES * 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 2 * source.numel() * _BYTES / _fastest(lambda: target.copy_(source), 5)


def rates(shape: Shape, rows: int) -> Card:
    """The card of this machine; where it is in no table its measured rates, in float32 for both."""
    known = find_card(None)
    if known is not None:
        return known
    measured = matmul_rate(shape, rows)
    return Card("this machine, as measured in float32", measured, measured, copy_rate())
