"""The processes that train together: which instances each of them has, and what they exchange.

Rewards compare texts of the global batch, so every rank computes them for all of it from embeddings that are gathered once, and keeps those
of its own rollouts. One process with B instances and N processes with B / N each then take the same step.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of `count` processes with equal numbers of instances; with one process every method returns its argument.

    Rank r has the instances r, r + count, r + 2 count, ... of a batch: cut into minibatches in order, the ranks' parts then make up the
    minibatches of the global batch. All ranks call the methods together, except for `share` and `own`.

    Attributes:
        rank: 0 to count - 1.
        count: number of processes.
        device: where tensors are exchanged.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot be changed

    @classmethod
    def of(cls, module: L.LightningModule) -> "Ranks":
        """Returns the ranks of a module's trainer; one process without a trainer."""
        trainer = module._trainer
        return cls() if trainer is None or trainer.world_size == 1 else cls(trainer.global_rank, trainer.world_size, module.device)

    def require_same(self, names: Sequence[str]) -> None:
        """Raises ValueError, on all ranks, if one of them was given a batch with other record ids."""
        if self.count == 1:
            return
        value = float(zlib.crc32("\n".join(names).encode()))
        high, low = self.largest(value, -value)
        if high != -low:
            raise ValueError(
                "the processes were given different batches, and each takes its share of one itself: let the datamodule give every process "
                "the same, and leave trainer.use_distributed_sampler=false"
            )

    def share(self, batch: Sequence[Item]) -> list[Item]:
        """Returns this rank's instances of a batch.

        Raises:
            ValueError: the batch cannot be shared evenly.
        """
        if len(batch) % self.count:
            raise ValueError(
                f"a batch of {len(batch)} instances cannot be shared out evenly over {self.count} processes: change trainer.devices, or "
                "the datamodule's batch (datamodule.batch_size; of docstrings modules_per_batch * docstrings_per_module)"
            )
        return list(batch[self.rank :: self.count])

    def own(self, rows: Tensor, instances: int) -> Tensor:
        """Selects this rank's rows of the global batch, in their order.

        Args:
            rows: [count * n, ...], n the rows of a rank.
            instances: of a rank; n is a multiple of it, those of an instance side by side.
        """
        return rows if self.count == 1 else rows.unflatten(0, (instances, self.count, -1))[:, self.rank].flatten(0, 1)

    def gather(self, rows: Tensor, instances: int) -> Tensor:
        """Returns the rows of the global batch, [count * n, ...], in its order, from this rank's [n, ...]; arguments as of `own`."""
        if self.count == 1:
            return rows
        if rows.numel() == 0:  # no negatives
            return rows.new_empty((len(rows) * self.count, *rows.shape[1:]))
        return self._all(rows).unflatten(1, (instances, -1)).transpose(0, 1).flatten(0, 2)

    def gather_uneven(self, values: Tensor) -> tuple[Tensor, slice]:
        """Returns the values of all ranks, [sum of n], from [n] of each, n differing; and the place of this rank's."""
        if self.count == 1:
            return values, slice(0, len(values))
        sizes = self._all(torch.tensor([len(values)], device=self.device)).flatten().tolist()
        padded = values.new_zeros(max(sizes))
        padded[: len(values)] = values
        first = sum(sizes[: self.rank])
        parts = [part[:size] for part, size in zip(self._all(padded), sizes, strict=True)] if max(sizes) else [padded]
        return torch.cat(parts), slice(first, first + len(values))

    def total(self, *values: float) -> list[float]:
        """Returns the sum over ranks of each value."""
        return list(values) if self.count == 1 else self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Returns the maximum over ranks of each value."""
        return list(values) if self.count == 1 else self._reduced(values, distributed.ReduceOp.MAX)

    def objects(self, value: Item) -> list[Item]:
        """Returns each rank's value, anything that can be pickled."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def first(self, value: Item) -> Item:
        """Returns rank 0's value, anything that can be pickled."""
        found = [value]
        if self.count > 1:
            distributed.broadcast_object_list(found, device=self.device)
        return found[0]

    def _all(self, values: Tensor) -> Tensor:
        """Returns [count, ...]."""
        sent = values.to(self.device, torch.uint8 if values.dtype == torch.bool else values.dtype).contiguous()  # gloo has no bool
        received = sent.new_empty((self.count, *sent.shape))
        distributed.all_gather(list(received.unbind()), sent)
        return received.to(values.device, values.dtype)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(reduced, operation)
        return reduced.tolist()


ALONE = Ranks()
"""One process."""
