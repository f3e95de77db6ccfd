"""Pooling of hidden states into text embeddings."""

import torch
from torch import Tensor

from src.modules.sequences import Rollouts


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states that a mask selects (GRACE: the text, the template's tokens after it, the rationale).

    Args:
        hidden: [N, T, D] any floating dtype; summed in float32.
        mask: [N, T] bool, True where a token counts.

    Returns:
        [N, D] float32, not normalised.

    Raises:
        ValueError: a row selects no token.
    """
    counts = mask.sum(dim=1)
    if not bool((counts > 0).all()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"embedding of zero tokens in rows {empty}: the pooling mask selects nothing there")
    # Not a matrix product: autocast would round its result to bfloat16, and embeddings differ by little within a group.
    return hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1, dtype=torch.float32) / counts.unsqueeze(1)


def prefix_means(hidden: Tensor, rollouts: Rollouts, steps: int) -> Tensor:
    """The masked mean if each rationale were cut after t tokens, t = 0 .. steps.

    Args:
        hidden: [N, T, D].
        rollouts: N of them.
        steps: R, at least the longest rationale's tokens.

    Returns:
        [N, R + 1, D] float32; past a rationale's end its last mean.
    """
    mask = rollouts.pooling_mask
    sums = hidden.float().masked_fill(~mask.unsqueeze(-1), 0.0).cumsum(dim=1)
    offsets = torch.arange(steps + 1, device=hidden.device)
    # the last position that counts after t tokens
    last = torch.minimum(rollouts.prompt_lengths.unsqueeze(1) - 1 + offsets, rollouts.lengths.unsqueeze(1) - 1)
    counts = mask.cumsum(dim=1).gather(1, last)
    return sums.gather(1, last.unsqueeze(2).expand(-1, -1, hidden.shape[2])) / counts.unsqueeze(2)
