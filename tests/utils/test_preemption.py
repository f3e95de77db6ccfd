"""A toy that is stopped around the end of an epoch trains on every batch once. Whole runs: tests/test_resume.py."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from src.utils.preemption import BeginNextEpoch


class Toy(L.LightningModule):
    """Sees 0, 1, 2, ...; saves after every second batch and fails before batch `stop`."""

    def __init__(self, folder: Path, stop: int | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.seen, self.folder, self.stop = torch.nn.Linear(1, 1), list[int](), folder, stop

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Numbers(self.trainer), batch_size=None)

    def training_step(self, batch: int, batch_idx: int) -> None:
        if batch == self.stop:
            raise RuntimeError("stopped")
        self.seen.append(batch)

    def on_train_batch_end(self, outputs: object, batch: int, batch_idx: int) -> None:
        if (batch + 1) % 2 == 0:
            self.trainer.save_checkpoint(self.folder / f"{batch + 1}.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(IterableDataset[int]):
    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        return islice(count(), self.trainer.fit_loop.epoch_loop.batch_progress.total.processed, None)


@pytest.mark.parametrize("stops", [(4,), (5, 5), (5, 7), (5, 7, 8), (3, 9, 9, 11)], ids=str)
def test_every_batch_once_around_epoch_ends(stops, tmp_path):
    start = 0
    for stop in (*stops, None):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=3, limit_train_batches=4, callbacks=[BeginNextEpoch()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        toy, checkpoint = Toy(tmp_path, stop), tmp_path / f"{start}.ckpt" if start else None
        if stop is None:
            trainer.fit(toy, ckpt_path=checkpoint, weights_only=False)
        else:
            with pytest.raises(RuntimeError, match="stopped"):
                trainer.fit(toy, ckpt_path=checkpoint, weights_only=False)
        assert toy.seen == list(range(start, 12 if stop is None else stop))
        start = start if stop is None else stop // 2 * 2
