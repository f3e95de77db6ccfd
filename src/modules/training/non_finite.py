"""What is infinite or not a number stops training before it reaches the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A reward, a loss or a gradient is infinite or not a number; the weights are still those of the last good step."""


def require_finite(loss: Tensor, instance_ids: Sequence[str]) -> None:
    """Refuses the loss of a micro-batch before it reaches a gradient.

    Raises:
        NonFiniteError: it is infinite or not a number; the records are named.
    """
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of a micro-batch is {float(loss)}, records {', '.join(instance_ids)}; the weights were not changed. Look at these "
            "records; the last checkpoint is from before"
        )
