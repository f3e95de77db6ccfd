"""Pooling of hidden states into text embeddings."""

import torch
from torch import Tensor


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
