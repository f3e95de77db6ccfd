"""The pathwise part of the gradient: how the embedding of what was written should move. Pure functions.

The policy also embeds, so the objective J = E_{y ~ pi}[R(h(x, y))] depends on the weights in two ways (stochastic computation graphs,
Schulman et al., arXiv 1506.05254; Mohamed et al., arXiv 1906.10652):

    grad J = E[(R - b) grad log pi(y | x)]   score-function part: which rationales are written (all that GRACE keeps)
           + E[grad R(h(x, y))]              pathwise part: how what was written is embedded

The derivative of the batch's rewards in the unit vectors is taken once, before any update. Each update pools the states of the sequences
that it passes and adds -sum(derivative * unit vector) to the loss, whose gradient is that of the rewards (the cached gradient of GradCache,
arXiv 2101.06983).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.objectives.rewards import RewardFunction
from src.modules.types import ROLES, Embeddings, Reward, Role


@dataclass(frozen=True)
class RewardGradients:
    """The derivative of the rewards of a batch in every unit vector.

    Attributes:
        by_role: [B, D], [B, K, D], [B, M, D] float32, derivative of sum_i mean_k R[i, k].
        mean_reward: mean of R.
    """

    by_role: dict[Role, Tensor]
    mean_reward: float


def reward_and_gradients(reward: RewardFunction, embeddings: Embeddings, roles: Sequence[Role] = ROLES) -> tuple[Reward, RewardGradients]:
    """Returns the reward, detached, and its derivative in every unit vector.

    It is the sum over instances, not their mean: an update divides by the number of instances that it has.

    Args:
        reward: Embeddings -> Reward.
        embeddings: [B, D], [B, K, D], [B, M, D] unit vectors of the global batch.
        roles: those that are differentiated; the others' derivative is 0.

    Raises:
        ValueError: the reward has no derivative in the embeddings of these roles (a rank, a threshold, a detached tensor); or negatives
            alone are asked for, and there are none.
    """
    asked = [role for role in ROLES if role in roles and getattr(embeddings, role).numel()]
    if not asked:
        raise ValueError(f"module.pathwise_roles={list(roles)}, and the records have no negatives: name another role")
    # autocast would take the products of the backward pass in bfloat16, whatever the forward pass did
    with torch.enable_grad(), torch.autocast(embeddings.positive.device.type, enabled=False):
        leaves = {role: getattr(embeddings, role).detach().float().requires_grad_() for role in ROLES}
        found = reward(replace(embeddings, **leaves))
        derivatives: Sequence[Tensor | None] = [None]
        if found.total.requires_grad:
            derivatives = torch.autograd.grad(found.total.mean(dim=1).sum(), [leaves[role] for role in asked], allow_unused=True)
    if all(derivative is None for derivative in derivatives):
        raise ValueError(
            f"module.pathwise_weight: the reward is not differentiable in the embeddings ({', '.join(asked)}), as a rank, a threshold or a "
            "detached tensor is not, so there is no pathwise term. Name a reward that is by module.pathwise_reward, or set the weight to 0"
        )
    zeros: dict[Role, Tensor] = {role: torch.zeros_like(leaf.detach()) for role, leaf in leaves.items()}
    terms = {name: term.detach() for name, term in found.terms.items()}
    known: dict[Any, Tensor] = {role: g for role, g in zip(asked, derivatives, strict=True) if g is not None}
    total = found.total.detach()
    return Reward(terms, found.weights, total, found.scale), RewardGradients(zeros | known, float(total.mean()))


def pathwise_loss(embeddings: Tensor, gradients: Tensor) -> Tensor:
    """Returns -sum(gradients * unit vectors), a scalar, whose gradient is minus that of the rewards.

    Args:
        embeddings: [N, D] pooled and not normalised, with a graph.
        gradients: [N, D] of the rewards in the unit vectors.
    """
    return -(normalize(embeddings.float(), dim=-1) * gradients).sum()


def first_of_group(gradients: Tensor, k: int) -> Tensor:
    """Returns [G*K, D] from [G, D]: the reward takes the first of K rollouts, and so the others' derivative is 0."""
    spread = gradients.new_zeros(len(gradients), k, gradients.shape[1])
    spread[:, 0] = gradients
    return spread.flatten(0, 1)
