"""From files to batches, as training has it."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from src.datamodules.prepared_datamodule import PreparedDataModule
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import SentenceReader, TripletReader
from src.records import Triplet
from tests.builders import small_tokenizer


def records(folder: Path, count: int, *more: bytes) -> Path:
    lines = [json.dumps({"query": f"query {i}", "positive": f"text {i}", "negative": "no"}).encode() for i in range(count)]
    (folder / "data.jsonl").write_bytes(b"\n".join([*lines, *more]))
    return folder / "data.jsonl"


def data(path: Path, reader: Any = None, **settings: Any) -> PreparedDataModule:
    def limit() -> PromptLimit:
        return PromptLimit(small_tokenizer(), "Name the terms.", 60)

    settings = {"batch_size": 6, "cache_dir": str(path.parent / "cache"), **settings}
    return PreparedDataModule(str(path), ["*.jsonl"], reader or TripletReader(), limit, **settings)


def test_what_is_held_out_is_not_trained_on_and_a_pass_is_an_epoch(tmp_path):
    module = data(records(tmp_path, 20), val_fraction=0.1)
    loader = module.train_dataloader()
    seen = [triplet.positive for batch in loader for triplet in batch]
    assert len(loader) == 3
    assert len(set(seen)) == len(seen) == 18
    assert not set(seen) & set(module.fixed_triplets(2))
    assert len(module.fixed_triplets(5)) == 2
    assert module.fixed_triplets(5) == module.fixed_triplets(5) == data(tmp_path / "data.jsonl", val_fraction=0.1).fixed_triplets(5)


def test_texts_without_supervision_are_their_own_query_and_positive(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"a text about {i}\n" for i in range(20)))
    (batch, *_) = data(tmp_path / "text.txt", SentenceReader()).train_dataloader()
    assert all(triplet.query == triplet.positive and triplet.negatives == () for triplet in batch)


def test_malformed_records_stop_the_run_after_all_of_them_are_known(tmp_path):
    path = records(tmp_path, 20, *[b"{"] * 25, b"[]")
    with pytest.raises(ValueError, match=r"data\.jsonl:21: not JSON") as caught:
        data(path).prepare_data()
    message = str(caught.value)
    assert message.startswith(f"{path}: 46 records, of which 20 can be used, 0 have a text")
    assert "and 26 are malformed:\n  data.jsonl:21: not JSON" in message
    assert "data.jsonl:40: not JSON" in message
    assert "data.jsonl:41" not in message
    assert "and 6 more" in message
    assert message.endswith("datamodule.on_bad_record=skip")
    with pytest.raises(ValueError, match=r"data\.jsonl:21"):  # nor does a second run go on
        data(path).prepare_data()


def test_malformed_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path, caplog):
    path = records(tmp_path, 20, b"{", b'{"query": "many words %s", "positive": "p", "negative": "n"}' % (b"and more " * 40))
    for _ in range(2):  # prepared, and found prepared
        caplog.clear()
        module = data(path, on_bad_record="skip")
        with caplog.at_level(logging.INFO):
            module.prepare_data()
        assert (module.report.records, module.report.kept, module.report.bad, module.report.too_long) == (22, 20, 1, 1)
        assert "1 malformed records" in caplog.text
        assert "data.jsonl:21: not JSON" in caplog.text
        assert "1 have a text whose prompt is longer than module.max_prompt_tokens=60" in caplog.text
    assert len(module.prepared) == 20


def test_sources_too_small_for_a_batch_are_warned_about(tmp_path, caplog):
    rows = [{"query": "q", "positive": f"text {i}", "negative": "n", "source": "rare" if i < 3 else "common"} for i in range(23)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = data(tmp_path / "data.jsonl", group_by_source=True).train_dataloader()
    assert {t.source for batch in loader for t in batch} == {"common"}
    assert "1 sources have fewer records than a batch of 6" in caplog.text


def test_data_without_a_usable_record_is_told(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: 0 records.*nothing to train on"):
        data(tmp_path / "data.jsonl").prepare_data()
    (tmp_path / "data.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing to train on"):
        data(tmp_path / "data.jsonl").prepare_data()
    with pytest.raises(ValueError, match="do not fill one batch of 30"):
        data(records(tmp_path, 20), batch_size=30).train_dataloader()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data(tmp_path / "nowhere.jsonl").prepare_data()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"val_fraction": 0.0}, "a share between 0 and 1"),
        ({"on_bad_record": "ignore"}, "stop or skip"),
        ({"batch_size": 0}, r"datamodule\.batch_size=0"),
        ({"num_proc": 0}, r"datamodule\.num_proc=0"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        data(tmp_path / "data.jsonl", **settings)


# ---- with a trainer


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


@pytest.mark.parametrize("limit", [None, 3], ids=["whole epochs", "short epochs"])
def test_a_resumed_run_and_a_second_epoch_go_on_with_the_data_where_it_stood(tmp_path, limit):
    path = records(tmp_path, 25)  # 24 to train on: 6 batches a pass

    def fit(seen: Seen, epochs: int, ckpt_path: Path | None = None) -> list[list[str]]:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, limit_train_batches=limit, callbacks=[seen], **quiet)
        trainer.fit(Nothing(), datamodule=data(path, batch_size=4), ckpt_path=ckpt_path)
        return seen.batches

    epochs = 2 if limit is None else 4
    whole = fit(Seen(), epochs)
    assert len(whole) == 12
    assert {name for batch in whole[:6] for name in batch} == {name for batch in whole[6:] for name in batch}
    assert whole[:6] != whole[6:]
    for until in (2, 3, 6, 7, 11):
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(Seen(until, tmp_path / "stopped.ckpt"), epochs)
        assert fit(Seen(), epochs, tmp_path / "stopped.ckpt") == whole[until:], until
