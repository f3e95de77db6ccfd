"""Distillation: the embedding of a text without a rationale is drawn to its embedding with one. Pure functions.

The target is held (stop-gradient): the rationale teaches and is not taught. In an update the term is one more derivative in unit vectors,
like that of the pathwise part (pathwise.py).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from src.modules.types import Embeddings, Role

Distillation = Literal["similarity", "cosine"]
"""The loss that draws plain embeddings to those with a rationale."""


def similarity(plain: Tensor, target: Tensor, temperature: float = 0.05) -> Tensor:
    """Returns KL(p_i || q_i) of each text i: how it is similar to the other texts, with rationales (p) and without (q).

    p_i[j] = softmax over j != i of cos(target_i, target_j) / temperature, and q_i the same of the plain embeddings.

    Args:
        plain, target: [N, D] unit vectors.

    Returns:
        [N] float32; 0 where N is 2 or less, as one other text has a share of 1.
    """
    own = torch.eye(len(plain), dtype=torch.bool, device=plain.device)
    ours, theirs = ((x @ x.T / temperature).masked_fill(own, -1e4) for x in (plain, target))
    shares = theirs.softmax(dim=1)
    return cross_entropy(ours, shares, reduction="none") - cross_entropy(theirs, shares, reduction="none")


def cosine(plain: Tensor, target: Tensor) -> Tensor:
    """Returns 1 - cos(plain_i, target_i) of each text, [N] float32, from [N, D] unit vectors."""
    return 1 - (plain * target).sum(dim=1)


LOSSES: dict[Distillation, Callable[[Tensor, Tensor], Tensor]] = {"similarity": similarity, "cosine": cosine}


def distillation_gradients(plain: Mapping[Role, Tensor], embeddings: Embeddings, loss: Distillation) -> tuple[float, dict[Role, Tensor]]:
    """Returns the mean loss over texts, and the derivative of minus the loss in the plain embeddings.

    The derivative is that of B times the mean, as a reward's is of the sum over instances.

    Args:
        plain: [B, D] or [B*M, D] unit vectors of the texts of each role without rationales.
        embeddings: unit vectors of the same texts with their rationales; a positive's target is the mean of its K.
        loss: a name in LOSSES.
    """
    targets = {"query": embeddings.query, "positive": normalize(embeddings.positive.mean(dim=1), dim=-1)}
    targets["negative"] = embeddings.negative.flatten(0, 1)
    with torch.enable_grad(), torch.autocast(embeddings.query.device.type, enabled=False):
        leaf = torch.cat(list(plain.values())).detach().float().requires_grad_()
        mean = LOSSES[loss](leaf, torch.cat([targets[role] for role in plain]).float()).mean()
        (gradient,) = torch.autograd.grad(-mean * len(embeddings.query), leaf)
    return float(mean.detach()), dict(zip(plain, gradient.split([len(vectors) for vectors in plain.values()]), strict=True))
