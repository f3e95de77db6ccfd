"""Attention of a packed row in one call: FlexAttention (Dong et al., arXiv 2412.05496), for GPUs.

A call for each prompt would launch kernels by the hundred, each of a shape that has never been seen. Here one kernel is compiled, forward
and backward, for any lengths; blocks of tokens that do not see each other are left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens on a side of a block, FlexAttention's own default."""
LEAST_HEAD_SIZE = 16
"""Below it FlexAttention has no kernel."""

# It is compiled again for other heads, dtypes and without gradients, and once where a row has as many blocks as the model has heads: torch
# takes equal sizes for one. Without `fullgraph` what fails to compile would be computed with all scores in memory.
_compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)


def packed_block_mask(until: Tensor, positions: Tensor | None = None, window: int | None = None) -> BlockMask:
    """Returns the mask of a packed row, padded to whole blocks, in which token k is seen by the tokens k to until[k] - 1.

    With a window, those see it whose position is less than `window` after its own. The mask follows from the largest and the smallest
    `until` and position of each block; [L, L] never exists.

    Args:
        until: [L] int64.
        positions: [L] int64, of the tokens in their sequences; read with a window alone.
    """
    length = max(2, -(-len(until) // BLOCK)) * BLOCK  # torch would compile again for a single block
    alone = torch.arange(len(until), length, device=until.device) + 1  # a token of padding sees itself
    until = torch.cat([until, alone]).int()
    rows = torch.arange(length // BLOCK, device=until.device).unsqueeze(1)
    before, blocks = rows > rows.T, until.view(-1, BLOCK)
    full = before & (blocks.amin(dim=1) >= (rows + 1) * BLOCK)
    partial = (rows == rows.T) | (before & ~full & (blocks.amax(dim=1) > rows * BLOCK))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = visible
    if positions is not None and window is not None:
        places = torch.cat([positions, positions[-1:].expand(len(alone))]).int()
        left = places + window  # the first position that does not see a token; as a tensor, so that no window is compiled into the kernel
        newest, oldest = places.view(-1, BLOCK).amax(dim=1), places.view(-1, BLOCK).amin(dim=1)
        reached = oldest.unsqueeze(1) - newest < window  # without it no pair of tokens of two blocks is near enough
        near = newest.unsqueeze(1) - oldest < window  # with it all are
        partial, full = reached & (partial | full & ~near), full & near

        def visible_within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < until[key]) & (places[query] < left[key])

        seen = visible_within

    def listed(marked: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how many blocks each row of blocks has, and their numbers first."""
        order = marked.int().argsort(dim=1, descending=True, stable=True)
        return marked.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK, seen, (length, length))


def one_call_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    """Returns the attention [1, heads, L, d] of a packed row, by a compiled kernel on a GPU; on a CPU uncompiled, for tests.

    Args:
        query: [1, heads, L, d].
        key, value: [1, key-value heads, L, d].
        mask: of `packed_block_mask`.
    """
    length = query.shape[2]
    query, key, value = (F.pad(x, (0, 0, 0, mask.shape[-1] - length)) for x in (query, key, value))
    attend = _compiled if query.is_cuda else flex_attention
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output[:, :, :length]
