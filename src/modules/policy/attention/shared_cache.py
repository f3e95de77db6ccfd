"""Sampling attention of rollouts that share prompts: a prompt's keys and values are held and read once for all its rollouts.

A policy's own transformers model runs unchanged: inside `attention_set_to(model, SAMPLING_ATTENTION)` its layers call
`sampling_attention`, and a `SharedPromptCache` is their cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from src.modules.policy.attention.masked import causal_mask, masked_attention, require_supported
from src.modules.policy.buffers import Buffers
from src.modules.policy.products import product

SAMPLING_ATTENTION = "grace_shared_prompt"
"""The name of `sampling_attention` among the attentions of transformers."""


class SharedPromptCache:
    """Keys and values of G prompts, and of the rationales of N rows, in buffers that keep their place.

    Attention treats the rows of a prompt as more queries to it, so its keys are read once and not once a row: for that, rows
    are laid out as [G, S] slots, S the most rows of a prompt. A step reads its column from the device, and so depends on
    nothing that Python knows but shapes. There may be more prompts, tokens of a prompt and rows than are in use.

    Attributes:
        column: [1] int64, the column of the token that is fed.
        used: columns that a step reads, more than `column`; those past `column` have a bias of -inf.
        groups: [N] int64, the prompt of each row.

    Args:
        prompt_lengths: [G] int64, at least 1.
        groups: [n] int64, the prompt of each row in use, ascending.
        rows: N, at least n.
        prompt_tokens: P, at least the longest prompt.
        columns: R, of the rationales' buffers.
        buffers: hold all of it.
        bucket: (rows or prompts in use) -> those that buffers have after `keep`.
    """

    def __init__(
        self,
        prompt_lengths: Tensor,
        groups: Tensor,
        rows: int,
        prompt_tokens: int,
        columns: int,
        buffers: Buffers,
        bucket: Callable[[int], int] = int,
    ) -> None:
        self.prompt_tokens, self.columns, self.buffers, self.bucket = prompt_tokens, columns, buffers, bucket
        self.reading, self.used = True, 0
        self.prompt: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, [G, H, P, d], H key-value heads
        self.own: list[tuple[Tensor, Tensor]] = []  # [N, H, R, d]
        device = prompt_lengths.device
        self.column = buffers("column", (1,), torch.long, device)
        self.prompt_lengths = self._kept("prompt_lengths", prompt_lengths)
        self.slots = int(groups.bincount().max())
        self.ragged = not len(groups) == rows == len(prompt_lengths) * self.slots
        self._arrange(groups, rows)
        padding = torch.arange(prompt_tokens, device=device) >= prompt_lengths.unsqueeze(1)
        self.bias = buffers("bias", (len(self.groups), prompt_tokens + columns), torch.float32, device)  # of prompt and rationale
        self.bias[:, :prompt_tokens].masked_fill_(padding[self.groups], -torch.inf)
        self.bias[:, prompt_tokens:] = -torch.inf
        self._narrowed: dict[int, Tensor] = {}

    def _kept(self, name: str, values: Tensor) -> Tensor:
        return self.buffers(name, values.shape, values.dtype, values.device).copy_(values)

    def _arrange(self, groups: Tensor, rows: int) -> None:
        """Gives each row in use, [n] prompts ascending, a place among its prompt's slots; a slot without a row has any."""
        own, n = torch.arange(len(groups), device=groups.device), len(self.prompt_lengths) * self.slots
        places = own - torch.searchsorted(groups, groups)
        of_slot = own.new_zeros(n).index_put_((groups * self.slots + places,), own)
        self.groups, self.places = self._kept("groups", filled(groups, rows)), self._kept("places", filled(places, rows))
        self.row_of_slot = self._kept("row_of_slot", of_slot)

    @property
    def shape(self) -> tuple[int, ...]:
        """All that a step's shapes depend on."""
        return len(self.groups), len(self.prompt_lengths), self.slots, self.ragged, self.prompt_tokens, self.columns, self.used

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0: transformers asks, but positions are always given."""
        return 0

    def positions(self) -> Tensor:
        """Returns [N, 1] int64, the positions of the tokens that are fed, and lets attention see their column."""
        self.bias.index_fill_(1, self.prompt_tokens + self.column, 0.0)
        self._narrowed = {}
        return (self.prompt_lengths[self.groups] + self.column).unsqueeze(1)

    def bias_within(self, window: int | None) -> Tensor:
        """Returns [N, P + used] float32, `bias` for layers that see the last `window` tokens; made once a step."""
        bias = self.bias[:, : self.prompt_tokens + self.used]
        if window is None or window >= bias.shape[1]:
            return bias
        if window not in self._narrowed:
            columns = torch.arange(bias.shape[1], device=bias.device)
            prompt, own = columns[: self.prompt_tokens], columns[: self.used]
            left = self.column - window  # the last column that is out of sight
            left_of_prompt = (self.prompt_lengths[self.groups] + left).unsqueeze(1)
            unseen = torch.cat([prompt <= left_of_prompt, (own <= left).expand(len(bias), -1)], dim=1)
            self._narrowed[window] = bias.masked_fill(unseen, -torch.inf)
        return self._narrowed[window]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values, [rows, H, tokens, d], of a layer."""
        keys = keys.to(values.dtype)  # under autocast rotation has made float32 of them, which every step would round again
        if self.reading:
            count, heads, tokens, d = keys.shape
            shapes = {
                "prompt": (len(self.prompt_lengths), heads, self.prompt_tokens, d),
                "own": (len(self.groups), heads, self.columns, d),
            }
            prompt, own = (
                [self.buffers(f"{which} {kind} {layer_idx}", shape, keys.dtype, keys.device) for kind in ("keys", "values")]
                for which, shape in shapes.items()
            )
            for buffer, new in zip(prompt, (keys, values), strict=True):
                buffer[:count, :, :tokens] = new
            self.prompt.append((prompt[0], prompt[1]))
            self.own.append((own[0], own[1]))
        else:
            for buffer, new in zip(self.own[layer_idx], (keys, values), strict=True):
                buffer.index_copy_(2, self.column, new)
        return keys, values

    def keep(self, rows: Tensor) -> Tensor:
        """Drops all rows but these, [n] ascending indices, and prompts without rows.

        Returns:
            [N] int64, N >= n: the old row that each new one was; those past n are not in use.
        """
        kept = filled(rows, min(self.bucket(len(rows)), len(self.groups)))
        self.own = [(front(keys, kept, self.used), front(values, kept, self.used)) for keys, values in self.own]
        self.bias = front(self.bias, kept)
        alive, groups, sizes = self.groups[rows].unique_consecutive(return_inverse=True, return_counts=True)
        if len(alive) < len(self.prompt_lengths):
            alive = filled(alive, min(self.bucket(len(alive)), len(self.prompt_lengths)))
            self.prompt = [(front(keys, alive), front(values, alive)) for keys, values in self.prompt]
            self.prompt_lengths = front(self.prompt_lengths, alive)
        self.slots = min(self.bucket(int(sizes.max())), self.slots)
        self.ragged = (self.slots, len(self.prompt_lengths)) != (1, len(kept))
        self._arrange(groups, len(kept))
        return kept

    def of_slots(self, rows: Tensor) -> Tensor:
        """Lays out values of rows, [N, ...], as slots, [G, S, ...]."""
        return (rows[self.row_of_slot] if self.ragged else rows).unflatten(0, (len(self.prompt_lengths), self.slots))

    def of_rows(self, slots: Tensor) -> Tensor:
        """Reads values of rows, [N, ...], from slots, [G, S, ...]."""
        return slots[self.groups, self.places] if self.ragged else slots.flatten(0, 1)


def filled(index: Tensor, size: int) -> Tensor:
    """Returns indices [n] as [size], n <= size, those past n 0."""
    return nn.functional.pad(index, (0, size - len(index)))


def front(buffer: Tensor, index: Tensor, columns: int | None = None) -> Tensor:
    """Moves entries of a buffer to its front, of [N, H, R, d] the first columns; returns the front."""
    front = buffer[: len(index)]
    if columns is None:
        return front.copy_(buffer[index])
    front[:, :, :columns] = buffer[:, :, :columns][index]
    return front


def sampling_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    rollout_cache: SharedPromptCache,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: [N, heads, tokens, d] queries -> [N, tokens, heads, d].

    While prompts are read, attention is causal; later one new token a row attends to its prompt and its tokens so far.
    Raises ValueError as `require_supported`.

    Args:
        sliding_window: how many tokens this layer sees, the query's own included; None for all.
    """
    cache = rollout_cache
    if cache.reading:
        require_supported(kwargs)
        visible = causal_mask(query.shape[2], sliding_window, query.device)
        return masked_attention(query, key, value, visible, scaling).transpose(1, 2), None
    bias = cache.bias_within(sliding_window)
    output = _one_token(query.squeeze(2).to(value.dtype), scaling, bias, cache, int(module.layer_idx))  # type: ignore[arg-type]
    return output.to(value.dtype).unsqueeze(1), None


def _one_token(query: Tensor, scaling: float, bias: Tensor, cache: SharedPromptCache, layer: int) -> Tensor:
    """Returns the attention of queries [N, heads, d] to prompts and rationales so far, [N, heads, d] float32.

    Args:
        bias: [N, P + used].
    """
    keys, values = (prompt.flatten(0, 1) for prompt in cache.prompt[layer])  # [G * kv, P, d]
    own_keys, own_values = (own.flatten(0, 1)[:, : cache.used] for own in cache.own[layer])  # [N * kv, used, d]
    (n, heads, d), g, s = query.shape, len(cache.prompt_lengths), cache.slots
    kv = own_keys.shape[0] // n
    query = query.view(n, kv, -1, d)

    def to_slots(rows: Tensor) -> Tensor:
        """[N, kv, repeats, x] -> [G * kv, S * repeats, x], the rows of a prompt one matrix."""
        return cache.of_slots(rows).transpose(1, 2).reshape(g * kv, -1, rows.shape[-1])

    def to_rows(slots: Tensor) -> Tensor:
        return cache.of_rows(slots.view(g, kv, s, -1, slots.shape[-1]).transpose(1, 2))

    to_prompt = to_rows(product(to_slots(query), keys.transpose(1, 2)))
    to_own = product(query.flatten(0, 1), own_keys.transpose(1, 2)).view(n, kv, -1, cache.used)
    weights = torch.softmax(torch.add(bias[:, None, None], torch.cat([to_prompt, to_own], dim=-1), alpha=scaling), dim=-1)
    on_prompt, on_own = weights.split([cache.prompt_tokens, cache.used], dim=-1)
    from_own = product(on_own.flatten(0, 1), own_values).view(n, kv, -1, d)
    return (to_rows(product(to_slots(on_prompt), values)) + from_own).reshape(n, heads, d)


AttentionInterface.register(SAMPLING_ATTENTION, sampling_attention)
