"""Packing of rollouts that share prompts into one row: every prompt is computed once, and no token is padding.

    tokens   p p p p | a a a | b b | q q q | c c c c | d
    sees             | p + a | p+b |       | q + c   | q + d

All tokens are in one row, so the layers that treat tokens one by one (all but attention) compute no padding. A group costs
P + sum R tokens in place of K (P + R). Each sequence keeps its positions, so hidden states and gradients are those of
separate rows, but for rounding. Attention is one call for the row on a GPU, and on a CPU a call for each prompt and its rationales.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from src.modules.policy.attention.one_call import packed_block_mask
from src.modules.policy.pooling import POOLINGS, PoolingName
from src.modules.types import Rollouts


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
