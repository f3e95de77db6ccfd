"""The processes that train together: who rolls out what, and how each of them sees the whole batch.

Rewards compare texts of the whole batch, so every rank computes them for all of it, from embeddings that are gathered once,
and keeps those of its own rollouts. One process with B instances and N with B / N each then do the same.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of `count` processes, each with the same number of instances; with one process everything here changes nothing.

    Rank r has the instances r, r + count, r + 2 count, ... of a batch: cut into minibatches in order, the ranks' parts then
    make up the minibatches of the whole batch.

    All methods but `share`, `own` and `places` are to be called by all ranks together.

    Attributes:
        rank: 0 to count - 1.
        count: how many there are.
        device: where tensors are exchanged.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot be changed

    @classmethod
    def of(cls, module: L.LightningModule) -> "Ranks":
        """Those of a module's trainer; a module without one is alone."""
        trainer = module._trainer
        return cls() if trainer is None or trainer.world_size == 1 else cls(trainer.global_rank, trainer.world_size, module.device)

    # ---- whose is what

    def share(self, batch: Sequence[Item]) -> list[Item]:
        """This rank's instances of a batch.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if len(batch) % self.count:
            raise ValueError(
                f"a batch of {len(batch)} instances cannot be shared out evenly over {self.count} processes: change trainer.devices, or "
                "the datamodule's batch (datamodule.batch_size; of docstrings modules_per_batch * docstrings_per_module)"
            )
        return list(batch[self.rank :: self.count])

    def own(self, rows: Tensor, instances: int) -> Tensor:
        """This rank's of the rows of the whole batch, in their order.

        Args:
            rows: [count * n, ...], n the rows of a rank.
            instances: of a rank; n is a multiple of it, those of an instance side by side.
        """
        return rows if self.count == 1 else rows.unflatten(0, (instances, self.count, -1))[:, self.rank].flatten(0, 1)

    def places(self, rows: int, instances: int) -> Tensor:
        """[rows] int64: where this rank's rows stand among those of the whole batch."""
        return self.own(torch.arange(rows * self.count), instances)

    # ---- what the others have

    def require_same(self, names: Sequence[str]) -> None:
        """Compares a batch's record ids with the other ranks'.

        Raises:
            ValueError: on all ranks, where one has others.
        """
        value = float(zlib.crc32("\n".join(names).encode()))
        high, low = self.largest(value, -value)
        if high != -low:
            raise ValueError(
                "the processes were given different batches, and each takes its share of one itself: let the datamodule give every process "
                "the same, and leave trainer.use_distributed_sampler=false"
            )

    def gather(self, rows: Tensor, instances: int) -> Tensor:
        """[count * n, ...]: the rows of the whole batch, in its order; the arguments are as of `own`, `rows` [n, ...]."""
        if self.count == 1:
            return rows
        if rows.numel() == 0:  # negatives, where there are none
            return rows.new_empty((len(rows) * self.count, *rows.shape[1:]))
        return self._all(rows).unflatten(1, (instances, -1)).transpose(0, 1).flatten(0, 2)

    def on_whole(self, function: Callable[..., Tensor], instances: int) -> Callable[..., Tensor]:
        """A function of rows of the whole batch to as many, as one of this rank's rows."""
        if self.count == 1:
            return function
        return lambda *rows: self.own(function(*(self.gather(x, instances) for x in rows)), instances)

    def gather_uneven(self, values: Tensor) -> tuple[Tensor, slice]:
        """[sum of n] the values of all ranks, [n] each, n differing; and where this rank's stand."""
        if self.count == 1:
            return values, slice(0, len(values))
        sizes = self._all(torch.tensor([len(values)], device=self.device)).flatten().tolist()
        padded = values.new_zeros(max(sizes))
        padded[: len(values)] = values
        first = sum(sizes[: self.rank])
        parts = [part[:size] for part, size in zip(self._all(padded), sizes, strict=True)] if max(sizes) else [padded]
        return torch.cat(parts), slice(first, first + len(values))

    def total(self, *values: float) -> list[float]:
        """The sum over ranks of each."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """The greatest of each."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def objects(self, value: Item) -> list[Item]:
        """What each rank has, whatever can be pickled; for little, and rarely."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def _all(self, values: Tensor) -> Tensor:
        """[count, ...]."""
        sent = values.to(self.device, torch.uint8 if values.dtype == torch.bool else values.dtype).contiguous()  # gloo has no bool
        received = sent.new_empty((self.count, *sent.shape))
        distributed.all_gather(list(received.unbind()), sent)
        return received.to(values.device, values.dtype)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(reduced, operation)
        return reduced.tolist()


ALONE = Ranks()
"""One process."""
