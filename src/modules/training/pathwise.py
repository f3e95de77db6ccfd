"""The pathwise term of the gradient: how the embedding of what was written should move. Pure functions, and the check of its weights.

The policy also embeds, so the objective J = E_{y ~ pi}[R(h(x, y))] depends on the weights in two ways (stochastic computation graphs,
Schulman et al., arXiv 1506.05254; Mohamed et al., arXiv 1906.10652):

    grad J = E[(R - b) grad log pi(y | x)]   score-function term: which rationales are written (all that GRACE keeps)
           + E[grad R(h(x, y))]              pathwise term: how what was written is embedded

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

from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.rewards import Embeddings, RewardFunction
from src.modules.objectives.roles import Role
from src.modules.policy.model import Policy
from src.modules.types import Rollouts

SIDES: tuple[Role, ...] = ("positive", "query", "negative")


@dataclass(frozen=True)
class Companions:
    """Sequences that are embedded in the update and not learned from by their log-probs: queries and negatives of B instances.

    Attributes:
        rollouts: N of them, one rollout each.
        gradients: [N, D] float32, derivative of the rewards in the unit vector of each.
        instances: [N] int64, 0 to B - 1, whose query or negative it is.
    """

    rollouts: Rollouts
    gradients: Tensor
    instances: Tensor

    def __len__(self) -> int:
        return len(self.instances)

    def of(self, first: int, last: int) -> "Companions | None":
        """Returns those of the instances first to last - 1; None where there are none."""
        rows = ((self.instances >= first) & (self.instances < last)).nonzero().flatten()
        if len(rows) == 0:
            return None
        return Companions(self.rollouts[rows], self.gradients[rows], self.instances[rows])


@dataclass(frozen=True)
class PathwiseTerm:
    """The pathwise term of one rollout batch, for the updates on it. What it holds is of this rank, but for the two numbers.

    Attributes:
        gradients: by side that is learned from, [G*K, D] float32, derivative of the rewards in each rollout's unit vector.
        companions: queries and negatives that are not learned from; None where none takes part.
        instances: of all ranks.
        mean: of the rewards that are differentiated.
    """

    gradients: dict[Role, Tensor]
    companions: Companions | None
    instances: int
    mean: float


def reward_gradients(reward: RewardFunction, embeddings: Embeddings, sides: Sequence[Role] = SIDES) -> tuple[Embeddings, float]:
    """Returns the derivative of sum_i mean_k R[i, k] in every unit vector, and the mean of R.

    It is the sum over instances, not their mean: an update divides by the number of instances that it has.

    Args:
        reward: Embeddings -> Reward.
        embeddings: [B, D], [B, K, D], [B, M, D] unit vectors of the global batch.
        sides: those that are differentiated; the others' derivative is 0.

    Returns:
        Tensors of the same shapes, float32; the mean total reward.

    Raises:
        ValueError: the reward has no derivative in the embeddings of these sides (a rank, a threshold, a detached tensor); negatives
            alone are asked for, and there are none.
    """
    asked = [side for side in SIDES if side in sides and getattr(embeddings, side).numel()]
    if not asked:
        raise ValueError(f"module.pathwise_roles={list(sides)}, and the records have no negatives: name another side")
    # autocast would take the products of the backward pass in bfloat16, whatever the forward pass did
    with torch.enable_grad(), torch.autocast(embeddings.positive.device.type, enabled=False):
        leaves = {side: getattr(embeddings, side).detach().float().requires_grad_() for side in SIDES}
        total = reward(Embeddings(**leaves)).total
        found: Sequence[Tensor | None] = [None]
        if total.requires_grad:
            found = torch.autograd.grad(total.mean(dim=1).sum(), [leaves[side] for side in asked], allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"module.pathwise_weight: the reward is not differentiable in the embeddings ({', '.join(asked)}), as a rank, a threshold or a "
            "detached tensor is not, so there is no pathwise term. Name a reward that is by module.pathwise_reward, or set the weight to 0"
        )
    zeros = {side: torch.zeros_like(leaf.detach()) for side, leaf in leaves.items()}
    gradients: dict[Any, Tensor] = zeros | {side: g for side, g in zip(asked, found, strict=True) if g is not None}
    return Embeddings(**gradients), float(total.detach().mean())


def pathwise_loss(embeddings: Tensor, gradients: Tensor) -> Tensor:
    """Returns -sum(gradients * unit vectors), a scalar, whose gradient is minus that of the rewards.

    Args:
        embeddings: [N, D] pooled and not normalised, with a graph.
        gradients: [N, D] of the rewards in the unit vectors.
    """
    return -(normalize(embeddings.float(), dim=-1) * gradients).sum()


def first_of_group(gradients: Tensor, k: int) -> Tensor:
    """[G*K, D] from [G, D]: the reward looks at the first of K rollouts, and so the others' derivative is 0."""
    spread = gradients.new_zeros(len(gradients), k, gradients.shape[1])
    spread[:, 0] = gradients
    return spread.flatten(0, 1)


def companions_of(
    others: tuple[tuple[Role, ...], Rollouts] | None, gradients: dict[Role, Tensor], sides: Sequence[Role], instances: int
) -> Companions | None:
    """Returns the companions of a batch's sides that are not learned from; None where no side of `sides` is among them.

    Args:
        others: these sides, and one rollout of each of their texts, side behind side.
        gradients: by side, [B, D] of queries and [B*M, D] of negatives.
        sides: those that take part.
        instances: B.
    """
    if others is None:
        return None
    names, rollouts = others
    counts = [len(gradients[side]) for side in names]
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
    taken = [(side, start, count) for side, start, count in zip(names, starts, counts, strict=True) if side in sides and count]
    if not taken:
        return None
    rows = torch.cat([torch.arange(start, start + count) for _, start, count in taken])
    places = torch.cat([torch.arange(count) // (count // instances) for _, _, count in taken])
    plain = replace(rollouts[rows], logprobs=None, embeddings=None, prefix_embeddings=None, prompt_embeddings=None)
    return Companions(plain, torch.cat([gradients[side] for side, _, _ in taken]), places)


def check_weights(score_function: float, pathwise: float, sides: Sequence[str], policy: Policy, algorithm: Algorithm) -> None:
    """Refuses weights of the gradient's two parts that train nothing, or not what they say.

    Raises:
        ValueError: see GRACE.
    """
    if not (score_function >= 0 and pathwise >= 0):  # nor not a number
        raise ValueError(
            f"module.score_function_weight={score_function}, module.pathwise_weight={pathwise}: both must be at least 0, as a negative "
            "weight would train against the reward"
        )
    if not score_function and not pathwise:
        raise ValueError("module.score_function_weight=0 and module.pathwise_weight=0: nothing would be learned; set one above 0")
    if not score_function and algorithm.kl_coef:
        raise ValueError(
            f"module.score_function_weight=0 leaves out the algorithm's loss, and algorithm.kl_coef={algorithm.kl_coef} too: nothing "
            "would hold the policy near its start; use a small weight in place of 0"
        )
    if unknown := set(sides) - set(SIDES):
        raise ValueError(f"module.pathwise_roles={list(sides)}: {', '.join(sorted(unknown))} is not one of {', '.join(SIDES)}")
    if not pathwise:
        return
    if not sides:
        raise ValueError(
            f"module.pathwise_roles=[] and module.pathwise_weight={pathwise}: no embedding would be moved; set the weight to 0"
        )
    if policy.frozen_encoder is not None:
        raise ValueError(
            f"module.pathwise_weight={pathwise} moves the encoder, and policy.encoder=frozen holds it: use policy.encoder=live, or weight 0"
        )
    if algorithm.min_group_std > 0:
        raise ValueError(
            f"module.pathwise_weight={pathwise} takes part in every rollout batch, and algorithm.min_group_std={algorithm.min_group_std} "
            "leaves groups out and waits for others: set one of the two to 0"
        )
