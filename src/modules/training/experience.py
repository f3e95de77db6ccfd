"""What an update learns from: rollouts and what they earned, whole groups at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.modules.types import Rollouts


@dataclass(frozen=True)
class Experience:
    """B groups of K rollouts.

    Attributes:
        rollouts: B*K, those of an instance side by side.
        advantages: [B*K, T] float32, 0 outside the rationales.
        keep: [B, K] bool, False on rollouts that are left out of the loss.
        old_logprobs: [B*K, T] float32 of the sampling policy; None where one update makes them those of the update.
        reference_logprobs: [B*K, T] float32; None where the algorithm has no reference.
        instance_ids: B record ids.
        embedding_gradients: [B*K, D] float32, derivative of the rewards in each rollout's unit vector; None without a pathwise term.
    """

    rollouts: Rollouts
    advantages: Tensor
    keep: Tensor
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    instance_ids: tuple[str, ...]
    embedding_gradients: Tensor | None = None

    def __len__(self) -> int:
        return len(self.instance_ids)

    @property
    def tokens(self) -> int:
        """How many tokens the loss counts."""
        return int((self.rollouts.rationale_lengths * self.keep.flatten()).sum())

    def select(self, groups: Tensor) -> "Experience":
        """Some of the groups, [n] int64 indices, n >= 1."""
        k = self.keep.shape[1]
        rows = (groups.unsqueeze(1) * k + torch.arange(k, device=groups.device)).flatten()
        rollouts = self.rollouts[rows]
        columns = rollouts.input_ids.shape[1]
        old, reference = (None if x is None else x[rows, :columns] for x in (self.old_logprobs, self.reference_logprobs))
        ids = tuple(self.instance_ids[i] for i in groups.tolist())
        gradients = None if self.embedding_gradients is None else self.embedding_gradients[rows]
        return Experience(rollouts, self.advantages[rows, :columns], self.keep[groups], old, reference, ids, gradients)

    def to(self, device: torch.device | str) -> "Experience":
        """The same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Rollouts)}
        return replace(self, **moved)


def concatenate(parts: Sequence[Experience]) -> Experience:
    """Groups of several rollout batches or sides as one; all from the same policy and with the same K."""
    if len(parts) == 1:
        return parts[0]
    rollouts = [part.rollouts for part in parts]
    columns = max(part.input_ids.shape[1] for part in rollouts)
    return Experience(
        Rollouts(
            input_ids=_joined([part.input_ids for part in rollouts], columns),
            text_starts=_joined([part.text_starts for part in rollouts]),
            prompt_lengths=_joined([part.prompt_lengths for part in rollouts]),
            lengths=_joined([part.lengths for part in rollouts]),
            finished=_joined([part.finished for part in rollouts]),
            logprobs=_joined_if_there([part.logprobs for part in rollouts], columns),
        ),
        _joined([part.advantages for part in parts], columns),
        _joined([part.keep for part in parts]),
        _joined_if_there([part.old_logprobs for part in parts], columns),
        _joined_if_there([part.reference_logprobs for part in parts], columns),
        tuple(name for part in parts for name in part.instance_ids),
        _joined_if_there([part.embedding_gradients for part in parts]),
    )


def interleaving(sizes: Sequence[int]) -> Tensor:
    """An order, int64, of parts of so many groups one behind the other, in which any stretch holds of each its share."""
    return torch.cat([torch.arange(size) / size for size in sizes]).argsort(stable=True)


def _joined(tensors: Sequence[Tensor], columns: int | None = None) -> Tensor:
    """One after the other; padded to so many columns, with anything, as no mask reaches beyond a rollout's length."""
    return torch.cat([x if columns is None else torch.nn.functional.pad(x, (0, columns - x.shape[-1])) for x in tensors])


def _joined_if_there(tensors: Sequence[Tensor | None], columns: int | None = None) -> Tensor | None:
    present = [x for x in tensors if x is not None]
    return _joined(present, columns) if len(present) == len(tensors) else None
