"""The three texts of an instance (query, positive, negative), and the rewards of the rollouts of each. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from src.modules.objectives.rewards import RewardFunction
from src.modules.types import Embeddings, Role
from src.records import Triplet


def texts_of(batch: Sequence[Triplet], role: Role) -> list[str]:
    """Returns the texts of a role: B positives or queries, or B*M negatives, those of an instance side by side."""
    if role == "negative":
        return [negative for triplet in batch for negative in triplet.negatives]
    return [triplet.positive if role == "positive" else triplet.query for triplet in batch]


def ids_of(batch: Sequence[Triplet], role: Role) -> tuple[str, ...]:
    """Returns the record id of each text of a role."""
    return tuple(triplet.id for triplet in batch for _ in (triplet.negatives if role == "negative" else [None]))


def same_texts(batch: Sequence[Triplet], device: torch.device) -> Tensor | None:
    """Returns [B, B] bool, True where two instances share a text, be it the query or the positive of either; None if no two do."""
    texts = [(triplet.query, triplet.positive) for triplet in batch]
    place = {text: i for i, text in enumerate(dict.fromkeys(text for pair in texts for text in pair))}
    numbers = torch.tensor([[place[text] for text in pair] for pair in texts])  # [B, 2]
    same = (numbers[:, None, :, None] == numbers[None, :, None, :]).any(dim=3).any(dim=2)
    return same.to(device) if pairs_sharing(same) else None


def pairs_sharing(same: Tensor | None) -> int:
    """Returns how many pairs of instances share a text; `same` is what `same_texts` returned."""
    return 0 if same is None else int(same.sum() - len(same)) // 2


def role_reward(reward: RewardFunction, embeddings: Embeddings, role: Role) -> Callable[[Tensor], Tensor]:
    """Returns the reward of a role's rollouts, as a function of their unit vectors [G, K, D] to [G, K] float32.

    The rollout of a positive gets what the reward says, as published. The rollout of a query or a negative gets what the positives of
    its instance get, on average over their rollouts, with this rollout in the place of that text (and the k-th rollouts of the other
    instances in the places of theirs). With reward=paper a query's rollout k gets sim(q[k], p) - sum_m sim(q[k], n[m]) and so on: the
    terms that cancel out of a positive's advantage. This is the project's own; the published method learns from positives alone.

    Args:
        reward: Embeddings -> Reward.
        embeddings: of the batch; the other roles' are held.
        role: whose rollouts; G is B, for negatives B*M.
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

    return {"positive": of_positives, "query": of_queries, "negative": of_negatives}[role]
