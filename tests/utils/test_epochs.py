"""Runs of a toy that are stopped around the end of an epoch: every batch is done once, and no more than were asked for."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from src.utils.epochs import BeginNextEpoch


class Numbers(IterableDataset[int]):
    """0, 1, 2, ..., from the batch on that the trainer is at."""

    def __init__(self) -> None:
        self.trainer: L.Trainer | None = None

    def __iter__(self) -> Iterator[int]:
        assert self.trainer is not None
        return islice(count(), self.trainer.fit_loop.epoch_loop.batch_progress.total.processed, None)


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.seen = torch.nn.Linear(1, 1), list[int]()

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.seen.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverySecond(L.Callback):
    """And is stopped before batch `stop`."""

    def __init__(self, folder: Path, stop: int | None) -> None:
        self.folder, self.stop = folder, stop

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: int, batch_idx: int) -> None:
        if batch == self.stop:
            raise RuntimeError("stopped")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: int, batch_idx: int) -> None:
        if (batch + 1) % 2 == 0:
            trainer.save_checkpoint(self.folder / f"{batch + 1}.ckpt")


def run(folder: Path, stop: int | None, begin: int) -> list[int]:
    """The batches of three epochs of four that a process did."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [SaveEverySecond(folder, stop), BeginNextEpoch()]
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, limit_train_batches=4, callbacks=callbacks, **quiet)  # type: ignore[arg-type]
    numbers, toy = Numbers(), Toy()
    numbers.trainer = trainer
    loader, checkpoint = DataLoader(numbers, batch_size=None), folder / f"{begin}.ckpt" if begin else None
    if stop is None:
        trainer.fit(toy, loader, ckpt_path=checkpoint, weights_only=False)
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(toy, loader, ckpt_path=checkpoint, weights_only=False)
    return toy.seen


@pytest.mark.parametrize("stops", [(4,), (5, 5), (5, 7), (5, 7, 8), (3, 9, 9, 11)], ids=str)
def test_a_run_that_is_stopped_around_an_epoch_s_end_does_every_batch_once(stops: tuple[int, ...], tmp_path: Path) -> None:
    begin = 0
    for stop in stops:
        assert run(tmp_path, stop, begin) == list(range(begin, stop))
        begin = stop // 2 * 2
    assert run(tmp_path, None, begin) == list(range(begin, 12))
