"""The three sides of an instance, and what the rollouts of each earn. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from src.modules.objectives.rewards import Embeddings, RewardFunction
from src.records import Triplet

Role = Literal["positive", "query", "negative"]
CONTEXT_ROLES: tuple[Role, ...] = ("query", "negative")


def texts_of(batch: Sequence[Triplet], side: Role) -> list[str]:
    """The texts of a side: B positives or queries, or B*M negatives, those of an instance side by side."""
    if side == "negative":
        return [negative for triplet in batch for negative in triplet.negatives]
    return [triplet.positive if side == "positive" else triplet.query for triplet in batch]


def ids_of(batch: Sequence[Triplet], side: Role) -> tuple[str, ...]:
    """For each text of a side the id of its record."""
    return tuple(triplet.id for triplet in batch for _ in (triplet.negatives if side == "negative" else [None]))


def standing_in(reward: RewardFunction, embeddings: Embeddings, side: Role) -> Callable[[Tensor], Tensor]:
    """The reward of a side's rollouts, as a function of their unit vectors [G, K, D] to [G, K] float32.

    A positive's rollout earns what the reward says, as published. The rollout of a query or a negative earns what its
    instance's positives earn, on average over their rollouts, with this rollout in the place of that text (and the k-th
    rollouts of the other instances in the places of theirs). So with
    reward=paper a query's rollout k earns sim(q[k], p) - sum_m sim(q[k], n[m]) and so on: the very terms that cancel out of
    a positive's advantage. This is the project's own; the published method learns from positives alone.

    Args:
        reward: Embeddings -> Reward.
        embeddings: of the batch; for the sides that are not asked for.
        side: whose rollouts; G is B, for negatives B*M.
    """

    def of_positives(own: Tensor) -> Tensor:
        return reward(replace(embeddings, positive=own)).total

    def of_queries(own: Tensor) -> Tensor:
        columns = [reward(replace(embeddings, query=column)).total.mean(dim=1) for column in own.unbind(dim=1)]
        return torch.stack(columns, dim=1)

    def of_negatives(own: Tensor) -> Tensor:
        b, m = embeddings.negative.shape[:2]
        rewards = own.new_empty(b, m, own.shape[1])
        for place in range(m):
            for k, column in enumerate(own.unflatten(0, (b, m))[:, place].unbind(dim=1)):
                negative = embeddings.negative.clone()
                negative[:, place] = column
                rewards[:, place, k] = reward(replace(embeddings, negative=negative)).total.mean(dim=1)
        return rewards.flatten(0, 1)

    return {"positive": of_positives, "query": of_queries, "negative": of_negatives}[side]
