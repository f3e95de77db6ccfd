"""One row for the K rollouts of a prompt: the prompt is computed once, each rationale sees it and itself alone.

    row    p p p p . | a a a . | b b . . | c c c c
    sees             | p + a   | p + b   | p + c

A group costs P + K R tokens in place of K (P + R). Positions are those that each sequence would have alone, so hidden
states and gradients are those of the separate rows, but for rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.sequences import Rollouts


@dataclass(frozen=True)
class PackedGroups:
    """G groups of K rollouts, P the longest prompt and R the longest rationale among them, L = P + K R.

    Attributes:
        input_ids, position_ids: [G, L] int64.
        attention_mask: [G, 1, L, L] bool, True where row i may look at column j.
        source: [G * K, T] int64, the column of its group's row where each position of each rollout stands.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    source: Tensor


def pack(rollouts: Rollouts, group_size: int) -> PackedGroups:
    """Packs rollouts whose rows g*K .. g*K + K - 1 share one prompt (as the rollout engines return them)."""
    n, t = rollouts.input_ids.shape
    device = rollouts.input_ids.device
    prompt = rollouts.prompt_lengths.view(-1, group_size)[:, :1]  # [G, 1]
    longest_prompt, longest = int(prompt.max()), max(1, int(rollouts.rationale_lengths.max()))
    groups, width = len(prompt), longest_prompt + group_size * longest

    positions = torch.arange(t, device=device).expand(n, t)
    own_prompt = rollouts.prompt_lengths.unsqueeze(1)
    block = longest_prompt + (torch.arange(n, device=device) % group_size).unsqueeze(1) * longest
    source = torch.where(positions < own_prompt, positions, block + positions - own_prompt)
    source = torch.where(rollouts.attention_mask, source, 0)

    column = torch.arange(width, device=device)
    in_prompt = column < longest_prompt
    segment = torch.where(in_prompt, -1, (column - longest_prompt) // longest)  # -1 the prompt, k the k-th rationale
    offset = torch.where(in_prompt, column, (column - longest_prompt) % longest)
    position_ids = torch.where(in_prompt, offset, prompt + offset)  # [G, L]

    input_ids = rollouts.input_ids.new_zeros(groups, width)
    group = (torch.arange(n, device=device) // group_size).unsqueeze(1).expand(n, t)
    real = rollouts.attention_mask
    input_ids[group[real], source[real]] = rollouts.input_ids[real]

    same = segment.unsqueeze(1) == segment.unsqueeze(0)
    causal = same & (column.unsqueeze(1) >= column.unsqueeze(0))  # [L, L]
    to_prompt = (~in_prompt).unsqueeze(1) & in_prompt.unsqueeze(0)
    filled = (column < prompt).unsqueeze(1)  # [G, 1, L]: the prompt's padding is nobody's to see
    attention_mask = causal | (to_prompt & filled)
    return PackedGroups(input_ids, position_ids, attention_mask.unsqueeze(1), source)


def unpack(hidden: Tensor, packed: PackedGroups) -> Tensor:
    """[G, L, D] states of packed rows as [G * K, T, D] states of the rollouts (anything on padding)."""
    n = len(packed.source)
    groups = torch.arange(n, device=hidden.device) // (n // len(hidden))
    return hidden[groups.unsqueeze(1), packed.source]
