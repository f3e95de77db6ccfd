"""Log-probabilities of given tokens, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.modules.policy.products import cpu_products_rounded_to, logits_of

_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits at a time: on a CPU 4 MB of them, which its cache holds; on a GPU enough to keep it busy."""
_LEAST_TOKENS = 64  # in a chunk: below that, reading the weights costs more than computing with them


def tokens_at_a_time(vocabulary: int, device: str) -> int:
    """Returns the number of tokens whose logits may exist at once on a device of this type (`cpu`, or any accelerator)."""
    return max(_LEAST_TOKENS, _CHUNK_LOGITS.get(device, _CHUNK_LOGITS["cuda"]) // vocabulary)


class _SelectedLogprobs(torch.autograd.Function):
    """Log-probs by chunks of tokens; the forward pass computes the gradient in the states while it has a chunk's distribution.

    With p = softmax(W h), the gradient of log p[target] in h is W[target] - p W, times the upstream scalar: it is kept,
    [n, D], and no logits are computed again for it. In W it is (onehot - p) h, summed over tokens with the upstream
    factors: only where W is trained does the backward pass compute the logits again. The target's 1 - p is taken in float32, before any
    product: of a confident token, W[target] less p W in bfloat16 would be rounding.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, keep: bool) -> Any:
        logprobs, entropies, directions = [], [], []
        w = weight.to(hidden.dtype)
        exact = w if hidden.is_cuda else weight.float()
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            log_p = torch.log_softmax(logits_of(h, exact), dim=-1)
            logprobs.append(log_p.gather(-1, t.unsqueeze(-1)).squeeze(-1))
            p = log_p.exp()
            entropies.append(-log_p.mul_(p).sum(dim=-1))
            if keep:
                p.scatter_add_(-1, t.unsqueeze(-1), -torch.ones_like(p[:, :1]))
                directions.append(-(p.to(w.dtype) @ w))
        if keep:
            ctx.save_for_backward(hidden, weight, targets, torch.cat(directions))
            ctx.chunk = chunk
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, directions = ctx.saved_tensors
        to_hidden, to_weight = directions * upstream.unsqueeze(-1).to(directions.dtype), None
        if ctx.needs_input_grad[1]:
            exact = weight.to(hidden.dtype) if hidden.is_cuda else weight.float()
            to_weight = torch.zeros_like(weight, dtype=torch.float32)
            for h, t, f in zip(*(x.split(ctx.chunk) for x in (hidden, targets, upstream)), strict=True):
                p = torch.softmax(logits_of(h, exact), dim=-1).mul_(-f.unsqueeze(-1))
                p.scatter_add_(-1, t.unsqueeze(-1), f.unsqueeze(-1))
                if h.is_cuda:
                    to_weight += p.to(h.dtype).T @ h
                else:
                    with cpu_products_rounded_to(h.dtype):
                        to_weight.addmm_(p.T, h.float())  # adds up in float32, without a [V, D] product in between
            to_weight = to_weight.to(weight.dtype)
        return to_hidden, to_weight, None, None, None


def selected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Computes log-probs of `targets` under softmax(hidden @ weight.T / temperature), and the entropies of that distribution.

    By chunks of tokens: [tokens, vocabulary] would take 0.6 GB a thousand tokens at a vocabulary of 152k.

    Args:
        hidden: [n, D].
        weight: [V, D] of the output embedding (no bias).
        targets: [n] int64.
        chunk_tokens: tokens at a time; by default `tokens_at_a_time`.

    Returns:
        Two [n] float32 tensors; the entropies carry no gradient.
    """
    if len(targets) == 0:
        return (hidden.new_zeros(0, dtype=torch.float32),) * 2
    device = hidden.device.type
    hidden = hidden / temperature  # [n, D] in place of the logits' [n, V]
    if torch.is_autocast_enabled(device):  # it has no effect inside an autograd.Function
        hidden = hidden.to(torch.get_autocast_dtype(device))
    chunk = chunk_tokens or tokens_at_a_time(len(weight), device)
    return _SelectedLogprobs.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())
