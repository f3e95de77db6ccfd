"""How fast sampling could be at all: its matrix products at the machine's rate, and its reading at the machine's rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

BYTES = 4  # of a float32


@dataclass(frozen=True)
class Work:
    """What sampling must compute and read: floating-point operations, and bytes."""

    flops: float
    bytes: float


def _layer_shapes(c: PretrainedConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix of a layer."""
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads, kv = c.num_attention_heads * d, c.num_key_value_heads * d
    attention = [(c.hidden_size, heads), (c.hidden_size, kv), (c.hidden_size, kv), (heads, c.hidden_size)]
    return [*attention, (c.hidden_size, c.intermediate_size), (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)]


def work(c: PretrainedConfig, prompt_lengths: list[int], n: int, new_tokens: int) -> Work:
    """Of n rationales for each prompt, each prompt computed and read once for all of them.

    Counted are matrix products and attention; of reading, the weights at every token and the keys and values.
    """
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    matrices = c.num_hidden_layers * sum(i * o for i, o in _layer_shapes(c))
    head = c.vocab_size * c.hidden_size
    rows, prompt_tokens = len(prompt_lengths) * n, sum(prompt_lengths)
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * d  # of a token with one other
    own_pairs = rows * new_tokens * (new_tokens + 1) / 2
    pairs = sum(p * (p + 1) / 2 for p in prompt_lengths) + n * new_tokens * prompt_tokens + own_pairs
    flops = 2 * matrices * (prompt_tokens + rows * new_tokens) + 2 * head * rows * new_tokens + attention * pairs
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * d  # numbers kept of a token
    read = new_tokens * (matrices + head) + cached * (new_tokens * prompt_tokens + own_pairs)
    return Work(flops, BYTES * read)


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


def matmul_rate(c: PretrainedConfig, rows: int) -> float:
    """Floating-point operations a second of the model's own matrix products, `rows` tokens at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds, flops = 0.0, 0.0
    shapes = [(shape, c.num_hidden_layers) for shape in _layer_shapes(c)] + [((c.hidden_size, c.vocab_size), 1)]
    for (inputs, outputs), times in shapes:
        x, w = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
        seconds += times * _fastest(lambda x=x, w=w: F.linear(x, w))
        flops += times * 2 * rows * inputs * outputs
    return flops / seconds


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(64 * 2**20 // BYTES * 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 2 * source.numel() * BYTES / _fastest(lambda: target.copy_(source), 5)
