"""One pass over rollouts that share prompts: every prompt is computed once, and no token is padding.

    tokens   p p p p | a a a | b b | q q q | c c c c | d
    sees             | p + a | p+b |       | q + c   | q + d

All tokens are in one row, so the layers that treat tokens one by one (all but attention) compute no padding. A group costs
P + sum R tokens in place of K (P + R). Each sequence keeps its positions, so hidden states and gradients are those of
separate rows, but for rounding. Attention is one call for the row on a GPU, and on a CPU a call for each prompt and its rationales.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel

from src.modules.policy.attention.one_call import LEAST_HEAD_SIZE, one_call_attention, packed_block_mask
from src.modules.policy.pooling import POOLINGS, PoolingName
from src.modules.types import Rollouts

PACKED_ATTENTION = "grace_packed"
"""The name of `packed_attention` among the attentions of transformers."""
_SHORT = 192
"""Keys up to which a CPU's attention with its gradient is faster in float32 than in bfloat16: at 80 keys 2.6 times, at 256 as fast."""


@contextmanager
def attention_set_to(model: nn.Module, name: str) -> Iterator[None]:
    """Sets the attention of a transformers model to the one named `name` in `AttentionInterface`, and back at the end."""
    config: Any = model.config
    config = config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def checkpoint_contexts(model: PreTrainedModel) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Returns the `context_fn` of `torch.utils.checkpoint` for a model: recomputation uses the attention of the forward pass.

    By then `attention_set_to` has ended.
    """
    config = model.config.get_text_config()
    return lambda: (nullcontext(), attention_set_to(model, config._attn_implementation))


def require_supported(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if a layer asks its attention for sinks or a soft cap: neither is computed here.

    Args:
        kwargs: what the layer passes to its attention.
    """
    if unread := [name for name in ("s_aux", "softcap") if kwargs.get(name) is not None]:
        raise ValueError(
            f"the model's attention has {', '.join(unread)}, which rollouts that share a prompt do not support; use a model without"
        )


def causal_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Returns [T, T] bool, in which a token sees the last `window` tokens, itself included; None where plain causal attention is that."""
    if window is None or tokens <= window:
        return None
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu(1 - window)


@dataclass(frozen=True)
class Group:
    """A prompt of P tokens and its K rationales, the longest of R tokens, in the packed row.

    A prompt with a single rationale shares nothing: it is one sequence, of P tokens with the rationale, and has K = 0.

    Attributes:
        prompt: P.
        rationales: tokens of all its rationales together.
        padded: [K * R] int64, the place of each rationale's tokens among them; any place on padding.
        real: [rationales] int64, the entries of `padded` that are no padding.
        visible: [R, P + R] bool, the attention mask of a rationale over its prompt and itself.
    """

    prompt: int
    rationales: int
    padded: Tensor
    real: Tensor
    visible: Tensor

    @classmethod
    def of(cls, prompt: int, lengths: Tensor, device: torch.device) -> "Group":
        """Returns the group of a prompt and of rationales of these lengths, [K] int64."""
        if len(lengths) == 1:
            prompt, lengths = prompt + int(lengths), lengths[:0]
        longest, total = max(lengths.tolist(), default=0), int(lengths.sum())
        column, starts = torch.arange(longest), lengths.cumsum(0) - lengths
        padded = (starts.unsqueeze(1) + column).clamp(max=total - 1).flatten()
        entries = (column < lengths.unsqueeze(1)).flatten().nonzero().flatten()
        visible = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
        return cls(prompt, total, padded.to(device), entries.to(device), visible.to(device))

    def visible_within(self, window: int | None) -> Tensor:
        """Returns `visible`, of the last `window` tokens alone."""
        return self.visible if window is None else self.visible.triu(self.prompt - window + 1)


@dataclass(frozen=True)
class PackedRollouts:
    """N rollouts of G prompts in one row of L tokens.

    Attributes:
        input_ids, position_ids: [1, L] int64.
        until: [L] int64; a token is seen by itself and those that follow it, up to this place: the end of its group, or of its rationale.
        prompts, counts: [G] int64, tokens of each prompt and number of its rationales.
        rationales: [N] int64, tokens of each rationale.
        source: [N, T] int64, the place in the row of each position of each rollout; 0 on padding.
        lead: [N] int64, the rollout that brings the prompt of each.
    """

    input_ids: Tensor
    position_ids: Tensor
    until: Tensor
    prompts: Tensor
    counts: Tensor
    rationales: Tensor
    source: Tensor
    lead: Tensor

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The prompts and their rationales, in order."""
        lengths = self.rationales.cpu().split(self.counts.tolist())
        return tuple(Group.of(prompt, own, self.until.device) for prompt, own in zip(self.prompts.tolist(), lengths, strict=True))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with its rationale."""
        return int(self.position_ids.max()) + 1

    @cached_property
    def _block_masks(self) -> dict[int | None, BlockMask]:
        return {}

    def block_mask(self, window: int | None = None) -> BlockMask:
        """Returns the mask of the whole row, made once for all layers that see the last `window` tokens."""
        if window not in self._block_masks:
            self._block_masks[window] = packed_block_mask(self.until, self.position_ids[0], window)
        return self._block_masks[window]


def pack(rollouts: Rollouts, groups: Tensor) -> PackedRollouts:
    """Packs rollouts; neighbours of the same number in `groups`, [N] int64, have the same prompt."""
    device = rollouts.input_ids.device
    _, group, counts = groups.to(device).unique_consecutive(return_inverse=True, return_counts=True)
    first = (counts.cumsum(0) - counts)[group]  # [N], the row that brings the prompt
    leads = first == torch.arange(len(group), device=device)

    prompts, rationales = rollouts.prompt_lengths, rollouts.rationale_lengths
    brought = rationales + leads * prompts
    end = brought.cumsum(0)
    start = end - brought  # the place of a row's first token
    positions = torch.arange(rollouts.input_ids.shape[1], device=device).expand_as(rollouts.input_ids)
    in_prompt = positions < prompts.unsqueeze(1)
    source = torch.where(in_prompt, start[first].unsqueeze(1), (start - ~leads * prompts).unsqueeze(1)) + positions
    real = rollouts.attention_mask
    taken = real & (leads.unsqueeze(1) | ~in_prompt)
    of_group = end[counts.cumsum(0) - 1][group]  # [N], where the group ends
    return PackedRollouts(
        input_ids=rollouts.input_ids[taken].unsqueeze(0),
        position_ids=positions[taken].unsqueeze(0),
        until=torch.where(in_prompt, of_group.unsqueeze(1), end.unsqueeze(1))[taken],
        prompts=prompts[leads],
        counts=counts,
        rationales=rationales,
        source=source.masked_fill(~real, 0),
        lead=first,
    )


def unpack(hidden: Tensor, packed: PackedRollouts) -> Tensor:
    """Returns the [N, T, D] states of the rollouts (undefined on padding) from the [1, L, D] states of the packed row."""
    return hidden[0][packed.source]


def pool_packed(hidden: Tensor, packed: PackedRollouts, rollouts: Rollouts, pooling: PoolingName) -> Tensor:
    """Returns [N, D] float32 embeddings, not normalised: those that `pool` makes of [N, T, D] states.

    A prompt is pooled once for all its rollouts; as [N, T, D] its states would be copied K times.

    Args:
        hidden: [1, L, D] states of the packed row.
        rollouts: those that were packed.
    """
    states, n = hidden[0], len(packed.lead)
    own = torch.arange(n, device=states.device)
    if pooling == "eos":
        return states[packed.source[own, rollouts.lengths - 1]].float()
    text = rollouts.pooling_mask & ~rollouts.rationale_mask & (packed.lead == own).unsqueeze(1)
    segment = torch.full((states.shape[0],), 2 * n, device=states.device)  # 0 .. n - 1 prompts, n .. 2n - 1 rationales, 2n the rest
    for mask, first in ((text, 0), (rollouts.rationale_mask, n)):
        rows, columns = mask.nonzero(as_tuple=True)
        segment[packed.source[rows, columns]] = rows + first
    if pooling == "mean":
        sums = torch.zeros(2 * n + 1, states.shape[1], device=states.device).index_add(0, segment, states.float())
        pooled = sums[packed.lead] + sums[n + own]
    else:
        lowest = torch.full((2 * n + 1, states.shape[1]), -torch.inf, device=states.device)
        highest = lowest.scatter_reduce(0, segment.unsqueeze(1).expand_as(states), states.float(), "amax", include_self=False)
        pooled = torch.maximum(highest[packed.lead], highest[n + own])
    return POOLINGS[pooling].finish(pooled, rollouts.pooling_mask.sum(dim=1))


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


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, dropout: float = 0.0) -> Tensor:
    """Returns the attention [N, heads, tokens, d] of queries to keys that are visible, [tokens, keys] bool; None is causal."""
    if query.requires_grad and query.dtype == torch.bfloat16 and key.shape[2] <= _SHORT and query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return masked_attention(query.float(), key.float(), value.float(), visible, scaling, dropout).to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    if visible is not None and grouped and query.device.type != "cpu":  # only the CPU's fast kernel reads grouped heads with a mask
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=visible is None, scale=scaling, enable_gqa=grouped
    )


class _Recomputed(torch.autograd.Function):
    """A function of tensors, without randomness, that the backward pass computes again.

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
