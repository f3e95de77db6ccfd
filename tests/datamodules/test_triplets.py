import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from src.datamodules.records import Triplet
from src.datamodules.triplets_datamodule import TripletsDataModule, read_triplets

GOOD = {"query": "what is a fox", "positive": "a fox is an animal", "negative": ["a box is a thing", "a sock"], "source": "zoo"}


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def test_a_good_file(tmp_path):
    file = write(tmp_path / "data.jsonl", GOOD, b"", {**GOOD, "negative": "one text"})
    first, second = read_triplets(file, negatives=1)
    assert first == Triplet("data.jsonl:1", GOOD["query"], GOOD["positive"], ("a box is a thing",), "zoo")
    assert second.id == "data.jsonl:3"
    assert second.negatives == ("one text",)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", r"data\.jsonl:2: not JSON"),
        (b"[]", r"data\.jsonl:2: a record is a JSON object"),
        (b'{"query": "\xff"}', r"data\.jsonl:2: not UTF-8"),
        ({"query": "a", "positive": "b"}, r"data\.jsonl:2: no field negative"),
        ({**GOOD, "query": 3}, r"data\.jsonl:2: query must be text"),
        ({**GOOD, "negative": [3]}, r"data\.jsonl:2: negative must be text"),
        ({**GOOD, "negative": []}, r"data\.jsonl:2: 0 negatives"),
        ({**GOOD, "positive": " "}, r"record 'data\.jsonl:2': positive is empty"),
        ({**GOOD, "negative": [""]}, r"record 'data\.jsonl:2': negative is empty"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=complaint):
        TripletsDataModule(str(write(tmp_path / "data.jsonl", GOOD, line))).prepare_data()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_triplets("nowhere.jsonl", 1)


def test_what_is_held_out_is_not_trained_on_and_batches_are_whole(tmp_path):
    file = write(tmp_path / "data.jsonl", *({**GOOD, "positive": f"text {i}"} for i in range(20)))
    data = TripletsDataModule(str(file), batch_size=6, held_out=0.1)
    batches = iter(data.train_dataloader())
    epoch = [t.positive for _ in range(3) for t in next(batches)]
    assert len(set(epoch)) == 18
    assert not set(epoch) & set(data.fixed_texts(2))
    assert data.fixed_texts(5) == data.fixed_texts(5)
    with pytest.raises(ValueError, match="do not fill one batch"):
        TripletsDataModule(str(file), batch_size=30).train_dataloader()


class Seen(L.Callback):
    """Notes the records of every batch; ends training after batch `until` and saves there."""

    def __init__(self, until: int = -1, file: Path | None = None) -> None:
        self.until, self.file = until, file
        self.batches: list[list[str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([triplet.id for triplet in batch])
        if len(self.batches) == self.until:
            trainer.save_checkpoint(self.file)
            raise RuntimeError("interrupted")


class Nothing(L.LightningModule):
    """Trains one number that the batches have no say in."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Triplet], batch_idx: int) -> torch.Tensor:
        return self.number.square()

    def transfer_batch_to_device(self, batch: list[Triplet], device: torch.device, dataloader_idx: int) -> list[Triplet]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_and_a_second_epoch_go_on_with_the_data_where_it_stood(tmp_path):
    file = write(tmp_path / "data.jsonl", *({**GOOD, "positive": f"text {i}"} for i in range(24)))

    def batches(seen: Seen, epochs: int, ckpt_path: Path | None = None) -> list[list[str]]:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, limit_train_batches=6 // epochs, callbacks=[seen], **quiet)
        trainer.fit(Nothing(), datamodule=TripletsDataModule(str(file), batch_size=3), ckpt_path=ckpt_path)
        return seen.batches

    whole = batches(Seen(), epochs=1)
    assert len({tuple(batch) for batch in whole}) == 6
    assert batches(Seen(), epochs=2) == whole
    with pytest.raises(RuntimeError, match="interrupted"):
        batches(Seen(2, tmp_path / "two.ckpt"), epochs=1)
    assert batches(Seen(), epochs=1, ckpt_path=tmp_path / "two.ckpt") == whole[2:]
    with pytest.raises(RuntimeError, match="interrupted"):
        batches(Seen(5, tmp_path / "five.ckpt"), epochs=2)
    assert batches(Seen(), epochs=2, ckpt_path=tmp_path / "five.ckpt") == whole[5:]
