"""Tensors that keep their place in memory, so that a captured CUDA graph finds them again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """Tensors by name, each at the beginning of memory that is kept until the name asks for more.

    Attributes:
        moves: how often memory was allocated. A graph that was captured before reads what may since be another tensor's.
    """

    def __init__(self) -> None:
        self.moves = 0
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns zeros of a shape; what the name had before is lost."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is not None and memory.numel() >= size and (memory.dtype, memory.device) == (dtype, device):
            return memory[:size].zero_().view(*shape)
        self._memory[name] = memory = torch.empty(0)  # freed before more is asked for
        self._memory[name] = torch.zeros(size, dtype=dtype, device=device)
        self.moves += 1
        return self._memory[name].view(*shape)

    def bytes(self) -> int:
        """Returns the memory held."""
        return sum(memory.nbytes for memory in self._memory.values())
