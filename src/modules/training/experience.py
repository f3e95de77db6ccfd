"""Experience: the groups and the context that an update learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from src.modules.types import Rollouts


@dataclass(frozen=True)
class Experience:
    """Groups of K rollouts each, that this rank learns from; B is their number here.

    Attributes:
        rollouts: B*K, those of a text side by side.
        advantages: [B*K, T] float32, 0 outside the rationales.
        keep: [B, K] bool, False on rollouts that are left out of the algorithm's loss.
        old_logprobs: [B*K, T] float32 of the sampling policy; None if one update makes them those of the update.
        reference_logprobs: [B*K, T] float32; None if the algorithm has no reference.
        instance_ids: B record ids.
        embedding_gradients: [B*K, D] float32, the derivative of the rewards in each rollout's unit vector, times pathwise_weight; None
            without a pathwise term.
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
        """The number of tokens that the algorithm's loss counts."""
        return int((self.rollouts.rationale_lengths * self.keep.flatten()).sum())

    def select(self, groups: Tensor) -> "Experience":
        """Returns some of the groups, [n] int64 indices, n >= 1."""
        k = self.keep.shape[1]
        rows = (groups.unsqueeze(1) * k + torch.arange(k, device=groups.device)).flatten()
        rollouts = self.rollouts[rows]
        columns = rollouts.input_ids.shape[1]
        old, reference = (None if x is None else x[rows, :columns] for x in (self.old_logprobs, self.reference_logprobs))
        ids = tuple(self.instance_ids[i] for i in groups.tolist())
        gradients = None if self.embedding_gradients is None else self.embedding_gradients[rows]
        return Experience(rollouts, self.advantages[rows, :columns], self.keep[groups], old, reference, ids, gradients)

    def to(self, device: torch.device | str) -> "Experience":
        """Returns the same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Rollouts)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Context:
    """Texts that are embedded in the update and not learned from by their log-probs: queries and negatives for the pathwise term, and texts
    without rationales for distillation.

    Attributes:
        rollouts: N of them, one rollout each.
        gradients: [N, D] float32, the derivative of the rewards, or of minus the distillation loss, in the unit vector of each, times
            its weight.
        instances: [N] int64, place of their instance among this rank's.
    """

    rollouts: Rollouts
    gradients: Tensor
    instances: Tensor

    def __len__(self) -> int:
        return len(self.instances)

    def select(self, instances: Tensor) -> "Context | None":
        """Returns the texts of some instances, [n] int64; None if there are none."""
        rows = torch.isin(self.instances, instances).nonzero().flatten()
        return Context(self.rollouts[rows], self.gradients[rows], self.instances[rows]) if len(rows) else None


def concatenate(parts: Sequence[Experience]) -> Experience:
    """Joins groups of several rollout batches or roles; all of the same policy and with the same K."""
    if len(parts) == 1:
        return parts[0]
    rollouts = join_rollouts([part.rollouts for part in parts])
    others = {f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(Experience)[1:] if f.name != "instance_ids"}
    return Experience(rollouts=rollouts, instance_ids=tuple(name for part in parts for name in part.instance_ids), **others)


def join_contexts(parts: Sequence[Context]) -> Context | None:
    """Joins contexts; None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    rollouts = join_rollouts([part.rollouts for part in parts])
    return Context(rollouts, torch.cat([part.gradients for part in parts]), torch.cat([part.instances for part in parts]))


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Joins rollouts, padded to the longest; what one part lacks, the whole lacks."""
    return Rollouts(**{f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(Rollouts)})


def interleaving(sizes: Sequence[int]) -> Tensor:
    """Returns an order, int64, of parts of these sizes, one behind the other, in which any stretch holds a like share of each."""
    return torch.cat([torch.arange(size) / size for size in sizes]).argsort(stable=True)


def _join(tensors: Sequence[Tensor | None]) -> Any:
    """Joins rows; columns of token positions are padded, as no mask reaches beyond a rollout's length. None if one of them is."""
    present = [x for x in tensors if x is not None]
    if len(present) < len(tensors):
        return None
    columns = max(x.shape[-1] for x in present)
    return torch.cat([pad(x, (0, columns - x.shape[-1])) if x.dim() == 2 else x for x in present])
