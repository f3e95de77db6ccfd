"""Splitting, batching and resuming on prepared triplets."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from src.datamodules.preparation import SCHEMA
from src.datamodules.prepared import PreparedTriplets, TripletBatches, held_out


def make(folder: Path, sources: list[str], per_file: int = 7) -> PreparedTriplets:
    for start in range(0, len(sources), per_file):
        part = sources[start : start + per_file]
        texts = [f"text {start + i}" for i in range(len(part))]
        columns = {"id": texts, "query": texts, "positive": texts, "negatives": [["n"]] * len(part), "source": part}
        with pa.OSFile(str(folder / f"{start:06d}.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
    with pa.OSFile(str(folder / "999999.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA):
        pass  # a part of which nothing was kept
    return PreparedTriplets(folder)


def test_rows_come_in_the_order_asked_for(tmp_path):
    prepared = make(tmp_path, ["s"] * 20)
    assert len(prepared) == 20
    assert [t.id for t in prepared.triplets(np.array([13, 2, 19]))] == ["text 13", "text 2", "text 19"]
    (one,) = prepared.triplets(np.array([0]))
    assert one.negatives == ("n",)


def test_what_is_held_out_goes_by_the_seed_and_the_rest_is_trained_on():
    train, held = held_out(1000, 0.01, seed=3)
    assert len(held) == 10
    assert sorted([*train, *held]) == list(range(1000))
    assert (held == held_out(1000, 0.01, seed=3)[1]).all()
    assert not (held == held_out(1000, 0.01, seed=4)[1]).all()
    assert len(held_out(5, 0.01, seed=0)[1]) == 1


def test_a_pass_sees_everything_once_and_the_next_in_another_order(tmp_path):
    prepared = make(tmp_path, ["s"] * 30)
    done = 0
    stream = TripletBatches(prepared, [np.arange(30)], 6, seed=1, done=lambda: done)
    first = [t.id for batch in stream for t in batch]
    assert len(stream) == 5
    assert Counter(first) == Counter(f"text {i}" for i in range(30))
    assert first == [t.id for batch in stream for t in batch]
    done = 5
    second = [t.id for batch in stream for t in batch]
    assert Counter(second) == Counter(first)
    assert second != first
    assert first != [t.id for batch in TripletBatches(prepared, [np.arange(30)], 6, seed=2) for t in batch]


def test_a_stream_goes_on_anywhere_and_reads_nothing_to_get_there(tmp_path, monkeypatch):
    prepared = make(tmp_path, ["s"] * 31)

    def stream(done: int) -> TripletBatches:
        return TripletBatches(prepared, [np.arange(31)], 4, seed=1, done=lambda: done)

    whole = [batch for done in (0, 7, 14) for batch in stream(done)]
    assert len(whole) == 21
    asked = []
    genuine = prepared.triplets
    monkeypatch.setattr(prepared, "triplets", lambda places: asked.append(places) or genuine(places))
    for done in range(21):
        asked.clear()
        end_of_pass = (done // 7 + 1) * 7
        assert list(islice(stream(done), 2)) == whole[done : min(done + 2, end_of_pass)]
        assert len(asked) <= 2


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
    assert max(Counter(t.id for batch in batches for t in batch).values()) == 1


def test_too_little_for_a_batch_is_told(tmp_path):
    prepared = make(tmp_path, ["a"] * 5 + ["b"] * 5)
    with pytest.raises(ValueError, match="10 records in 1 groups do not fill one batch of 11"):
        TripletBatches(prepared, [np.arange(10)], 11, seed=0)
    with pytest.raises(ValueError, match="10 records in 2 groups do not fill one batch of 6"):
        TripletBatches(prepared, prepared.by_source(np.arange(10)), 6, seed=0)
