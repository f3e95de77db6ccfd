"""Sampling attention of rollouts that share prompts: a prompt's keys and values are held and read once for all its rollouts.

A policy's own transformers model runs unchanged: inside `attention_set_to(model, SAMPLING_ATTENTION)` its layers call
`sampling_attention`, and a `SharedPromptCache` is their cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from src.modules.policy.attention.shared_prompt import require_supported

SAMPLING_ATTENTION = "grace_shared_prompt"
"""The name of `sampling_attention` among the attentions of transformers."""


class SharedPromptCache:
    """Keys and values of G prompts, and of the rationales of N rows, in buffers that never grow.

    Attention treats the rows of a prompt as more queries to it, so its keys are read once and not once a row: rows are laid
    out as [G, S] slots, S the most rows of a prompt.

    Args:
        prompt_lengths: [G] int64.
        n: rows of each prompt at first; rows of a prompt are neighbours.
        max_new_tokens: R, columns of the rationales' buffers.
    """

    def __init__(self, prompt_lengths: Tensor, n: int, max_new_tokens: int) -> None:
        self.prompt_lengths, self.max_new_tokens = prompt_lengths, max_new_tokens
        self.step = -1  # column of the token that is fed; -1 while the prompts are read
        self.prompt: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, [G * H, P, d], H key-value heads
        self.own: list[tuple[Tensor, Tensor]] = []  # [N * H, R, d]
        self.prompt_bias = torch.empty(0)  # [G, 1, 1, P], -inf on padding
        places = torch.arange(len(prompt_lengths) * n, device=prompt_lengths.device)
        self.groups = places // n  # [N], the prompt of each row
        self.slot_of_row, self.row_of_slot = places, places  # [N], [G * S]; an empty slot has any row

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0: transformers asks, but positions are always given."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values, [rows, H, tokens, d], of a layer."""
        keys = keys.to(values.dtype)  # under autocast rotation has made float32 of them, which every step would round again
        if self.step < 0:
            self.prompt.append((keys.flatten(0, 1), values.flatten(0, 1)))
            shape = (len(self.groups) * keys.shape[1], self.max_new_tokens, keys.shape[3])
            self.own.append((keys.new_empty(shape), values.new_empty(shape)))
            if layer_idx == 0:
                padding = torch.arange(keys.shape[2], device=keys.device) >= self.prompt_lengths.unsqueeze(1)
                self.prompt_bias = torch.zeros(padding.shape, device=keys.device).masked_fill(padding, -torch.inf)[:, None, None]
        else:
            for buffer, new in zip(self.own[layer_idx], (keys, values), strict=True):
                buffer[:, self.step] = new.flatten(0, 2)
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, ascending indices, and prompts without rows."""
        n, count, used = len(self.groups), len(self.prompt_lengths), self.step + 1
        for layer, buffers in enumerate(self.own):
            shrunk = []
            for buffer in buffers:
                before = buffer.unflatten(0, (n, -1))
                kept = buffer.new_empty((len(rows), *before.shape[1:]))
                kept[:, :, :used] = before[rows, :, :used]
                shrunk.append(kept.flatten(0, 1))
            self.own[layer] = (shrunk[0], shrunk[1])
        alive, self.groups, sizes = self.groups[rows].unique_consecutive(return_inverse=True, return_counts=True)
        if len(alive) < count:
            self.prompt = [
                (k.unflatten(0, (count, -1))[alive].flatten(0, 1), v.unflatten(0, (count, -1))[alive].flatten(0, 1)) for k, v in self.prompt
            ]
            self.prompt_lengths, self.prompt_bias = self.prompt_lengths[alive], self.prompt_bias[alive]
        most, firsts, places = int(sizes.max()), sizes.cumsum(0) - sizes, torch.arange(len(rows), device=rows.device)
        self.slot_of_row = self.groups * most + places - firsts[self.groups]
        self.row_of_slot = firsts.repeat_interleave(most).index_put((self.slot_of_row,), places)


def sampling_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    rollout_cache: SharedPromptCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: [N, heads, tokens, d] queries -> [N, tokens, heads, d].

    While prompts are read, attention is causal; later one new token a row attends to its prompt and its tokens so far.
    Raises ValueError as `require_supported`.
    """
    cache = rollout_cache
    if cache.step < 0:
        require_supported(kwargs, query.shape[2] + cache.max_new_tokens)
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    prompt_keys, prompt_values = cache.prompt[layer]
    own_keys, own_values = (buffer[:, : cache.step + 1] for buffer in cache.own[layer])
    (n, heads, _, d), g = query.shape, len(cache.prompt_lengths)
    kv, s = own_keys.shape[0] // n, len(cache.row_of_slot) // g
    repeats = heads // kv
    query = query.view(n, kv, repeats, d) * scaling

    slots = query[cache.row_of_slot].view(g, s, kv, repeats, d).transpose(1, 2)
    to_prompt = slots.reshape(g * kv, s * repeats, d) @ prompt_keys.transpose(1, 2)
    to_prompt = (to_prompt.view(g, kv, s * repeats, -1) + cache.prompt_bias).view(g, kv, s, repeats, -1)
    to_own = query.reshape(n * kv, repeats, d) @ own_keys.transpose(1, 2)  # [N * kv, repeats, t]

    # two softmaxes as one: both halves relative to the larger of their maxima, then divided by the common sum
    own_max = to_own.amax(-1).view(n, kv, repeats)[cache.row_of_slot].view(g, s, kv, repeats).transpose(1, 2)
    largest = torch.maximum(to_prompt.amax(-1), own_max)  # [G, kv, S, repeats]
    prompt_weights = (to_prompt - largest.unsqueeze(-1)).exp()
    row_largest = largest.transpose(1, 2).flatten(0, 1)[cache.slot_of_row]
    own_weights = (to_own - row_largest.view(n * kv, repeats, 1)).exp()

    from_prompt = prompt_weights.view(g * kv, s * repeats, -1) @ prompt_values
    from_prompt = from_prompt.view(g, kv, s, repeats, d).transpose(1, 2).flatten(0, 1)[cache.slot_of_row]  # [N, kv, repeats, d]
    prompt_sum = prompt_weights.sum(-1).transpose(1, 2).flatten(0, 1)[cache.slot_of_row]
    total = prompt_sum + own_weights.sum(-1).view(n, kv, repeats)
    output = from_prompt + (own_weights @ own_values).view(n, kv, repeats, d)
    return (output / total.unsqueeze(-1)).view(n, 1, heads, d), None


AttentionInterface.register(SAMPLING_ATTENTION, sampling_attention)
