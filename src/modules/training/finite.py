"""Stops training before an infinite value or a nan reaches the weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A reward, a loss or a gradient is not finite; the weights are still those of the last good step."""


def require_finite(loss: Tensor, instance_ids: Sequence[str]) -> None:
    """Raises NonFiniteError, with the records, if the loss of a micro-batch is not finite."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of a micro-batch is {float(loss)}, records {', '.join(instance_ids)}; the weights were not changed. Look at these "
            "records; the last checkpoint is from before"
        )


def require_finite_rewards(terms: Mapping[str, Tensor], instance_ids: Sequence[str], batch: int) -> None:
    """Raises NonFiniteError, with term, rollout batch and records, if a reward [G, K] is not finite."""
    for name, term in terms.items():
        bad = (~torch.isfinite(term)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            records = ", ".join(instance_ids[i] for i in bad)
            raise NonFiniteError(
                f"reward term {name!r} is not finite in rollout batch {batch}, records {records}; the weights were not changed"
            )
