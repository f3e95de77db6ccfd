"""Time and memory of the phases of a training step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.memory import is_oom_error

WHAT_TO_LOWER = {
    "rollout": "rollout.batch_tokens or module.num_generations (for rollout=vllm: rollout.gpu_memory_utilization)",
    "encode": "module.micro_batch_tokens",
    "reference": "module.micro_batch_tokens",
    "update": "module.micro_batch_tokens, or set policy.gradient_checkpointing=true",
}
"""Phase -> settings that decide its memory."""


class OutOfMemoryError(RuntimeError):
    """A phase of a training step ran out of memory."""


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds a phase's wall time to `seconds`; waits for the GPU's queue, whose work would count for a later phase otherwise.

    Raises:
        OutOfMemoryError: the phase ran out of GPU or main memory; names the setting to lower.
    """
    start = time.perf_counter()
    try:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not is_oom_error(error):
            raise
        raise OutOfMemoryError(
            f"out of memory in the {phase} phase of a rollout batch: lower {WHAT_TO_LOWER[phase]}, and go on with ckpt_path=last"
        ) from error
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def clock(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
