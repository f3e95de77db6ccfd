"""Log-probabilities of given tokens, without ever holding all logits."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.to(hidden.dtype).T).float() / temperature
    normaliser = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.no_grad():  # entropy is looked at, not trained on
        entropy = normaliser - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logprobs, entropy


def selected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` under softmax(hidden @ weight.T / temperature), and the entropies of that distribution.

    Chunk by chunk, and the backward pass computes each chunk's logits again, so that [tokens, vocabulary] (0.6 GB a
    thousand tokens at 152k) never exists whole.

    Args:
        hidden: [n, D].
        weight: [V, D] of the output embedding (no bias).
        targets: [n] int64.

    Returns:
        Two [n] float32 tensors; the entropies carry no gradient.
    """
    if len(targets) == 0:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    parts = [
        checkpoint(_chunk, h, weight, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
