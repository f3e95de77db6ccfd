"""Attention of a packed row (see policy/packing.py)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from src.modules.policy.attention.masked import causal_mask, masked_attention, require_supported
from src.modules.policy.attention.one_call import LEAST_HEAD_SIZE, one_call_attention
from src.modules.policy.packing import Group, PackedRollouts

PACKED_ATTENTION = "grace_packed"
"""The name of `packed_attention` among the attentions of transformers."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packed: PackedRollouts,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: [1, heads, L, d] queries -> [1, L, heads, d].

    One call for the row on a GPU; on a CPU, and with dropout, which that call does not have, one for each prompt and for its rationales.

    Raises ValueError as `require_supported`.

    Args:
        sliding_window: how many tokens this layer sees, the query's own included; None for all.
    """
    require_supported(kwargs)
    window = sliding_window if sliding_window is not None and sliding_window < packed.longest else None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation has made float32 of these two
    if value.is_cuda and not dropout and value.shape[3] >= LEAST_HEAD_SIZE:
        return one_call_attention(query, key, value, packed.block_mask(window), scaling).transpose(1, 2), None
    return grouped_attention(query, key, value, packed.groups, scaling, dropout, window).transpose(1, 2), None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scaling: float, dropout: float = 0.0, window: int | None = None
) -> Tensor:
    """Returns the attention [1, heads, L, d] of a packed row, group by group, to the last `window` tokens.

    One masked call for all would compute every pair of tokens in the row, and on a CPU took twice as long.
    """
    sizes = [size for group in groups for size in (group.prompt, group.rationales)]
    parts = list(zip(*(states[0].transpose(0, 1).split(sizes) for states in (query, key, value)), strict=True))
    outputs = []
    for group, prompt, rationales in zip(groups, parts[::2], parts[1::2], strict=True):
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in prompt)
        output = masked_attention(q, k, v, causal_mask(group.prompt, window, q.device), scaling, dropout)
        outputs.append(output[0].transpose(0, 1))
        if group.rationales:
            attend = partial(_rationales_attention, group, window, dropout, scaling)
            outputs.append(attend(*prompt[1:], *rationales) if dropout else _Recomputed.apply(attend, *prompt[1:], *rationales))
    return torch.cat(outputs).transpose(0, 1).unsqueeze(0)


class _Recomputed(torch.autograd.Function):
    """A function of tensors, without randomness, that the backward pass computes again (on a CPU in float32 where it is short).

    If they were kept, the copies of a prompt's keys and values for its rationales would grow with K. torch.utils.checkpoint
    keeps reference cycles, which wait for the garbage collector: 150 MiB in a thousand steps.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, *torch.autograd.grad(output, inputs, upstream)


def _rationales_attention(
    group: Group, window: int | None, dropout: float, scaling: float, prompt_key: Tensor, prompt_value: Tensor, *rationales: Tensor
) -> Tensor:
    """Returns the attention of the K rationales of a group, each over the prompt and itself; [tokens, heads, d].

    Args:
        prompt_key, prompt_value: [tokens, heads, d].
        rationales: their queries, keys and values, [tokens, heads, d].
    """
    query, key, value = (x.index_select(0, group.padded).unflatten(0, (-1, len(group.visible))).transpose(1, 2) for x in rationales)
    key, value = (
        torch.cat([shared.transpose(0, 1).expand(len(query), -1, -1, -1), own], dim=2)
        for shared, own in ((prompt_key, key), (prompt_value, value))
    )
    output = masked_attention(query, key, value, group.visible_within(window), scaling, dropout)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, group.real)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
