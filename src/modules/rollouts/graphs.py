"""CUDA graphs of a step that is taken many times: a replay launches all of its kernels at once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

_MOST = 64
"""Graphs kept: some ten MB of launch parameters each. Their tensors share one pool of memory."""


class Graphs:
    """Captured steps by key, those used last.

    Attributes:
        captures: steps captured so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = 0
        self._kept: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Takes a step: as it is for a new key, which warms up libraries, captured the second time, and replayed from then on.

        Args:
            key: of all that a step's kernels and their arguments depend on, but the contents of tensors.
            step: reads and writes tensors that outlive it, always the same for one key.

        Raises:
            RuntimeError: a step that cannot be captured.
        """
        if key not in self._kept:
            self._kept[key] = None
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            return
        self._kept.move_to_end(key)
        graph = self._kept[key]
        if graph is None:
            graph = self._kept[key] = self._captured(step)
        graph.replay()

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads (data loaders, NCCL's) may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the model's decode step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): set rollout.cuda_graphs=false"
            ) from error
        self.captures += 1
        return graph
