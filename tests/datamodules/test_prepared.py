"""Splitting, batching and resuming on prepared triplets; from files to batches, as training has it."""

import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from src.datamodules import preparation
from src.datamodules.files import DataFile
from src.datamodules.preparation import prepare
from src.datamodules.prepared import PreparedDataModule, PreparedTriplets, TripletBatches, held_out
from src.datamodules.reading import TripletReader
from src.records import Triplet
from src.utils.preemption import BeginNextEpoch
from tests.datamodules.builders import limit, write, write_triplets


def make(folder: Path, sources: list[str]) -> PreparedTriplets:
    """A prepared folder of several files with a record for each source, and of one with none."""
    rows = [{"query": f"text {i}", "positive": "p", "negative": "n", "source": source} for i, source in enumerate(sources)]
    parts = [rows[i : i + 7] for i in range(0, len(rows), 7)] + [[rows[0] | {"positive": "too long " * 50}]]
    files = [DataFile(write(folder / f"{i}.jsonl", *part), f"{i}.jsonl") for i, part in enumerate(parts)]
    return PreparedTriplets(prepare(files, TripletReader(), limit(), folder / "cache", num_proc=1))


def test_triplets_in_the_order_asked_for(tmp_path):
    prepared = make(tmp_path, ["s"] * 20)
    assert len(prepared) == 20
    assert [t.query for t in prepared.triplets(np.array([13, 2, 19]))] == ["text 13", "text 2", "text 19"]
    assert prepared.triplets(np.array([8])) == [Triplet("1.jsonl:2", "text 8", "p", ("n",), "s")]


def test_held_out_follows_the_seed():
    train, held = held_out(1000, 0.01, seed=3)
    assert len(held) == 10
    assert sorted([*train, *held]) == list(range(1000))
    assert (held == held_out(1000, 0.01, seed=3)[1]).all()
    assert not (held == held_out(1000, 0.01, seed=4)[1]).all()
    assert len(held_out(5, 0.01, seed=0)[1]) == 1


def test_pass_sees_everything_once(tmp_path):
    prepared = make(tmp_path, ["s"] * 30)
    done = 0
    stream = TripletBatches(prepared, [np.arange(30)], 6, seed=1, done=lambda: done)
    first = [t.query for batch in stream for t in batch]
    assert len(stream) == 5
    assert Counter(first) == Counter(f"text {i}" for i in range(30))
    assert first == [t.query for batch in stream for t in batch]
    done = 5
    second = [t.query for batch in stream for t in batch]
    assert Counter(second) == Counter(first)
    assert second != first
    assert first != [t.query for batch in TripletBatches(prepared, [np.arange(30)], 6, seed=2) for t in batch]


def test_resumed_stream_reads_no_earlier_batch(tmp_path, monkeypatch):
    prepared, asked = make(tmp_path, ["s"] * 31), []
    triplets = prepared.triplets
    monkeypatch.setattr(prepared, "triplets", lambda places: asked.append(places) or triplets(places))
    assert len(list(islice(TripletBatches(prepared, [np.arange(31)], 4, seed=1, done=lambda: 5), 2))) == len(asked) == 2


def test_batches_of_one_source(tmp_path):
    sources = ["b", "a", "c", "a"] * 10 + ["rare"]
    prepared = make(tmp_path, sources)
    train = np.arange(2, len(sources))
    groups = prepared.by_source(train)
    assert [{sources[i] for i in group} for group in groups] == [{"a"}, {"b"}, {"c"}, {"rare"}]
    assert sorted(np.concatenate(groups)) == train.tolist()
    stream = TripletBatches(prepared, groups, 4, seed=0)
    batches = list(stream)
    assert len(batches) == len(stream) == 4 + 2 + 2
    assert all(len({t.source for t in batch}) == 1 for batch in batches)
    assert len({batch[0].source for batch in batches[:4]}) > 1  # sources are mixed over time
    assert max(Counter(t.query for batch in batches for t in batch).values()) == 1


def test_no_group_fills_a_batch(tmp_path):
    prepared = make(tmp_path, ["a"] * 5 + ["b"] * 5)
    with pytest.raises(ValueError, match="10 records in 1 groups do not fill one batch of 11"):
        TripletBatches(prepared, [np.arange(10)], 11, seed=0)
    with pytest.raises(ValueError, match="10 records in 2 groups do not fill one batch of 6"):
        TripletBatches(prepared, prepared.by_source(np.arange(10)), 6, seed=0)


# ---- the data module


def data(path: Path, **settings: Any) -> PreparedDataModule:
    settings = {"batch_size": 6, "cache_dir": str(path.parent / "cache"), **settings}
    return PreparedDataModule(str(path), ["*.jsonl"], TripletReader, lambda: limit(60), **settings)


def test_pass_is_an_epoch_without_held_out(tmp_path):
    module = data(write_triplets(tmp_path / "data.jsonl", 20), val_fraction=0.1)
    loader = module.train_dataloader()
    seen = [triplet.positive for batch in loader for triplet in batch]
    assert len(loader) == 3
    assert len(set(seen)) == len(seen) == 18
    assert not set(seen) & {triplet.positive for triplet in module.fixed_triplets(2)}
    assert len(module.fixed_triplets(5)) == 2
    assert module.fixed_triplets(5) == module.fixed_triplets(5) == data(tmp_path / "data.jsonl", val_fraction=0.1).fixed_triplets(5)


def test_malformed_records_stop_the_run(tmp_path):
    path = write_triplets(tmp_path / "data.jsonl", 20, *[b"{"] * 25, b"[]")
    with pytest.raises(ValueError, match=r"data\.jsonl:21: not JSON") as caught:
        data(path).prepare_data()
    message = str(caught.value)
    assert message.startswith(f"{path}: 46 records, of which 20 can be used, 0 have a text")
    assert "26 are malformed:\n  data.jsonl:21: not JSON" in message
    assert "data.jsonl:40: not JSON" in message
    assert "data.jsonl:41" not in message
    assert "and 6 more" in message
    assert message.endswith("datamodule.on_bad_record=skip")
    with pytest.raises(ValueError, match=r"data\.jsonl:21"):  # also once it is prepared
        data(path).prepare_data()


def test_malformed_records_are_skipped_on_request(tmp_path, caplog):
    too_long = b'{"query": "many words %s", "positive": "p", "negative": "n"}' % (b"and more " * 40)
    path = write_triplets(tmp_path / "data.jsonl", 20, b"{", too_long)
    for _ in range(2):  # prepared, and found prepared
        caplog.clear()
        module = data(path, on_bad_record="skip")
        with caplog.at_level(logging.INFO):
            module.prepare_data()
        assert (module.report.records, module.report.kept, module.report.bad, module.report.too_long) == (22, 20, 1, 1)
        for said in ("1 malformed records", "data.jsonl:21: not JSON", "1 have a text whose prompt", "module.max_prompt_tokens=60"):
            assert said in caplog.text
    assert len(module.prepared) == 20


def test_negatives_that_are_left_out_are_counted_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(preparation, "_CHUNK_BYTES", 600)
    equal = b'{"query": "q", "positive": "p", "negative": ["p ", "q", "n"]}'
    path = write_triplets(tmp_path / "data.jsonl", 20, equal, equal)
    for _ in range(2):  # prepared, and found prepared
        caplog.clear()
        module = data(path, num_proc=2)
        with caplog.at_level(logging.INFO):
            module.prepare_data()
        assert (module.report.records, module.report.kept, module.report.equal_negatives) == (22, 22, 4)
        assert "4 negatives that equal the query or the positive of their record are left out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        data(write_triplets(tmp_path / "other.jsonl", 20)).prepare_data()
    assert "20 can be used" in caplog.text
    assert "negatives that equal" not in caplog.text


def test_small_sources_are_warned_about(tmp_path, caplog):
    rows = [{"query": "q", "positive": f"text {i}", "negative": "n", "source": "rare" if i < 3 else "common"} for i in range(23)]
    loader = data(write(tmp_path / "data.jsonl", *rows), group_by_source=True).train_dataloader()
    assert {t.source for batch in loader for t in batch} == {"common"}
    assert "1 sources have fewer records than a batch of 6" in caplog.text


def test_no_usable_record(tmp_path):
    for lines in ([], [b""]):
        with pytest.raises(ValueError, match=r"data\.jsonl: 0 records.*nothing to train on"):
            data(write(tmp_path / "data.jsonl", *lines)).prepare_data()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data(tmp_path / "nowhere.jsonl").prepare_data()


@pytest.mark.parametrize("setting", [{"val_fraction": 0.0}, {"on_bad_record": "ignore"}, {"batch_size": 0}, {"num_proc": 0}], ids=str)
def test_senseless_settings(tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"datamodule\.{name}={value!r}"):
        data(tmp_path / "data.jsonl", **setting)


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
    """Trains one number that does not depend on the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Triplet], batch_idx: int) -> torch.Tensor:
        return self.number.square()

    def transfer_batch_to_device(self, batch: list[Triplet], device: torch.device, dataloader_idx: int) -> list[Triplet]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("limit_batches", [None, 3], ids=["full epochs", "short epochs"])
def test_resumed_run_continues_the_stream(tmp_path, limit_batches):
    path, checkpoint = write_triplets(tmp_path / "data.jsonl", 25), tmp_path / "stopped.ckpt"  # 24 to train on: 6 batches a pass

    def fit(seen, ckpt_path=None):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        epochs, callbacks = 2 if limit_batches is None else 4, [seen, BeginNextEpoch()]
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, limit_train_batches=limit_batches, callbacks=callbacks, **quiet)
        trainer.fit(Nothing(), datamodule=data(path, batch_size=4), ckpt_path=ckpt_path)
        return seen.batches

    uninterrupted = fit(Seen())
    assert len(uninterrupted) == 12
    assert {name for batch in uninterrupted[:6] for name in batch} == {name for batch in uninterrupted[6:] for name in batch}
    assert uninterrupted[:6] != uninterrupted[6:]
    for stops in ((2,), (3, 4, 5), (6, 7, 9), (3, 6, 11), (9, 10)):  # within epochs and at their ends
        start = 0
        for stop in stops:
            seen = Seen(stop - start, checkpoint)
            with pytest.raises(RuntimeError, match="interrupted"):
                fit(seen, checkpoint if start else None)
            assert seen.batches == uninterrupted[start:stop], (stops, stop)
            start = stop
        assert fit(Seen(), checkpoint) == uninterrupted[start:], stops
