"""Attention of rollouts that share prompts: a prompt's keys and values are held and read once for all its rollouts.

A policy's own transformers model runs unchanged; while `decoding` is in force its attention layers call
`shared_prompt_attention`, and `SharedPromptCache` is what they take for their cache.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from src.modules.policy.attention.switch import attending_by, refuse_unread

_NAME = "grace_shared_prompt"


class SharedPromptCache:
    """Keys and values of G prompts, and of the rationales of N rows, in buffers that never grow.

    Rows belong to prompts in the order of `groups`; `keep` drops rows, and prompts without rows. Attention treats the
    rows of a prompt as more queries to it, so its keys are read once and not once a row.

    Args:
        groups: [N] int64, the prompt of each row, ascending, every prompt at least once.
        prompt_lengths: [G] int64.
        max_new_tokens: R, columns of the rationales' buffers.
    """

    def __init__(self, groups: Tensor, prompt_lengths: Tensor, max_new_tokens: int) -> None:
        self.groups, self.prompt_lengths, self.max_new_tokens = groups, prompt_lengths, max_new_tokens
        self.step = -1  # column of the token that is being fed; -1 while the prompts are read
        self.prompt: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, [G * H, P, d], H key-value heads
        self.own: list[tuple[Tensor, Tensor]] = []  # [N * H, R, d]
        self.prompt_bias = torch.empty(0)  # [G, 1, 1, P], -inf on padding
        self._place()

    def _place(self) -> None:
        """Where each row stands among its prompt's rows: [N] slots and S, the most rows of a prompt."""
        counts = torch.bincount(self.groups)
        starts = counts.cumsum(0) - counts
        self.slots = torch.arange(len(self.groups), device=self.groups.device) - starts[self.groups]
        self.width = int(counts.max())
        self.full = bool((counts == self.width).all())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What transformers asks a cache for; positions are always given, so only its type matters."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values [rows, H, tokens, d] of a layer; what to attend to is up to the attention."""
        keys = keys.to(values.dtype)  # under autocast rotation has made float32 of them, which every step would round again
        if self.step < 0:
            heads, d = keys.shape[1], keys.shape[3]
            self.prompt.append((keys.flatten(0, 1), values.flatten(0, 1)))
            shape = (len(self.groups) * heads, self.max_new_tokens, d)
            self.own.append((keys.new_empty(shape), values.new_empty(shape)))
            if layer_idx == 0:
                positions = torch.arange(keys.shape[2], device=keys.device)
                padding = positions >= self.prompt_lengths.unsqueeze(1)
                self.prompt_bias = torch.zeros(padding.shape, device=keys.device).masked_fill(padding, -torch.inf)[:, None, None]
        else:
            for buffer, new in zip(self.own[layer_idx], (keys, values), strict=True):
                buffer[:, self.step] = new.flatten(0, 2)
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, given by ascending index."""
        groups = self.groups[rows]
        alive, self.groups = groups.unique_consecutive(return_inverse=True)
        used = self.step + 1
        for layer, (keys, values) in enumerate(self.own):
            shape = (-1, keys.shape[0] // len(self.slots), *keys.shape[1:])
            shrunk = []
            for buffer in (keys, values):
                kept = buffer.new_empty((len(rows), *shape[1:]))
                kept[:, :, :used] = buffer.view(shape)[rows, :, :used]
                shrunk.append(kept.flatten(0, 1))
            self.own[layer] = (shrunk[0], shrunk[1])
        if len(alive) < len(self.prompt_lengths):
            count = len(self.prompt_lengths)
            self.prompt = [
                (k.unflatten(0, (count, -1))[alive].flatten(0, 1), v.unflatten(0, (count, -1))[alive].flatten(0, 1)) for k, v in self.prompt
            ]
            self.prompt_lengths, self.prompt_bias = self.prompt_lengths[alive], self.prompt_bias[alive]
        self._place()

    def to_slots(self, rows: Tensor) -> Tensor:
        """[N, ...] as [G, S, ...], zeros where a prompt has fewer than S rows."""
        if self.full:
            return rows.unflatten(0, (-1, self.width))
        padded = rows.new_zeros((len(self.prompt_lengths), self.width, *rows.shape[1:]))
        padded[self.groups, self.slots] = rows
        return padded

    def from_slots(self, slots: Tensor) -> Tensor:
        """[G, S, ...] back to [N, ...]."""
        return slots.flatten(0, 1) if self.full else slots[self.groups, self.slots]


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    rollout_cache: SharedPromptCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: [rows, heads, tokens, d] queries -> [rows, tokens, heads, d].

    Raises:
        ValueError: a layer with a sliding window, sinks or a soft cap, which are not read here.
    """
    refuse_unread(kwargs, "rollout=hf cannot sample from")
    if rollout_cache.step < 0:
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None
    return _decode(query, scaling, rollout_cache, int(module.layer_idx)), None  # type: ignore[arg-type]


def _decode(query: Tensor, scaling: float, cache: SharedPromptCache, layer: int) -> Tensor:
    """One new token a row, over its prompt and its own tokens so far; [N, A, 1, d] -> [N, 1, A, d]."""
    n, heads, _, d = query.shape
    prompt_keys, prompt_values = cache.prompt[layer]
    own_keys, own_values = (buffer[:, : cache.step + 1] for buffer in cache.own[layer])
    kv = own_keys.shape[0] // n
    query = query.view(n, kv, heads // kv, d) * scaling

    slots = cache.to_slots(query).transpose(1, 2)  # [G, kv, S, A/kv, d]
    g, _, s, repeats, _ = slots.shape
    to_prompt = slots.reshape(g * kv, s * repeats, d) @ prompt_keys.transpose(1, 2)  # [G * kv, S * A/kv, P]
    to_prompt = to_prompt.view(g, kv, s * repeats, -1) + cache.prompt_bias
    to_own = query.reshape(n * kv, repeats, d) @ own_keys.transpose(1, 2)  # [N * kv, A/kv, t]

    # two softmaxes as one: both halves relative to the larger of their maxima, then divided by the common sum
    to_prompt = to_prompt.view(g, kv, s, repeats, -1)
    own_max = cache.to_slots(to_own.amax(-1).view(n, kv, repeats)).transpose(1, 2)  # [G, kv, S, A/kv]
    largest = torch.maximum(to_prompt.amax(-1), own_max)
    prompt_weights = (to_prompt - largest.unsqueeze(-1)).exp()
    row_largest = cache.from_slots(largest.transpose(1, 2)).reshape(n * kv, repeats, 1)
    own_weights = (to_own - row_largest).exp()

    from_prompt = prompt_weights.view(g * kv, s * repeats, -1) @ prompt_values
    from_prompt = cache.from_slots(from_prompt.view(g, kv, s, repeats, d).transpose(1, 2))  # [N, kv, A/kv, d]
    prompt_sum = cache.from_slots(prompt_weights.sum(-1).transpose(1, 2))
    total = prompt_sum + own_weights.sum(-1).view(n, kv, repeats)
    output = from_prompt + (own_weights @ own_values).view(n, kv, repeats, d)
    return (output / total.unsqueeze(-1)).reshape(n, 1, heads, d)


AttentionInterface.register(_NAME, shared_prompt_attention)


def decoding(model: PreTrainedModel) -> AbstractContextManager[None]:
    """While in force, the model's attention layers read a SharedPromptCache, given as `rollout_cache`."""
    return attending_by(model, _NAME)
