import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.wordnet_tasks import DESCRIPTIONS, read_rows, wordnet_sets, wordnet_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from tests.conftest import ROOT

FOLDER = ROOT / "experiments" / "everyday_english" / "data"
DISTINCT = {"small": 210, "large": 1469}


class Counting(RationaleEncoder):
    """Keeps the texts that it embeds."""

    def encode(self, texts: list[str], prompt_type: str | None = None) -> np.ndarray:  # type: ignore[override]
        self.seen = [*getattr(self, "seen", []), *texts]
        return super().encode(texts, prompt_type)


def texts_of(sets: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, set[str]]:
    """The texts of each task."""
    fields = ("text", "sentence1", "sentence2")
    return {name: {row[key] for part in rows.values() for row in part for key in fields if key in row} for name, rows in sets.items()}


@pytest.mark.parametrize("size", ["small", "large"])
def test_every_text_is_one_of_the_retrieval_task_and_short(size: str) -> None:
    texts = texts_of(wordnet_sets(read_rows(FOLDER, size)))
    assert all(found <= texts["retrieval"] for found in texts.values())
    assert len(texts["retrieval"]) == DISTINCT[size]
    assert max(map(len, texts["retrieval"])) <= 160


def test_the_small_set_is_a_part_of_the_large_and_the_mini_one() -> None:
    small, large = read_rows(FOLDER, "small"), read_rows(FOLDER, "large")
    assert read_rows(FOLDER, "mini") == small
    assert all([row for row in large[name] if row["small"]] == rows for name, rows in small.items())
    assert all(0 < len(rows) < len(large[name]) for name, rows in small.items())


@pytest.mark.parametrize("size", ["small", "large"])
def test_train_and_test_of_the_classification_share_no_text_and_every_class(size: str) -> None:
    rows = wordnet_sets(read_rows(FOLDER, size))["classification"]
    train, test = ({row["text"]: row["label"] for row in rows[split]} for split in ("train", "test"))
    assert not train.keys() & test.keys()
    for labels in (train, test):
        counts = np.bincount(list(labels.values()))
        assert len(counts) == 15
        assert len(set(counts)) == 1


def test_every_query_has_its_answer_and_another_near_miss_in_the_corpus() -> None:
    for size in ("small", "large"):
        rows = read_rows(FOLDER, size)
        ids = {doc["id"] for doc in rows["documents"]}
        assert all({query["answer"], query["rival"]} <= ids and query["answer"] != query["rival"] for query in rows["queries"])
        assert all({pair["one"], pair["other"]} <= ids and pair["one"] != pair["other"] for pair in rows["pairs"])
        pairs = wordnet_sets(rows)["pairs"]["test"]
        assert [row["labels"] for row in pairs] == [1, 0] * len(rows["queries"])


def test_there_is_one_task_of_each_kind_with_its_data(tmp_path: Path) -> None:
    tasks = wordnet_tasks(FOLDER, tmp_path)
    assert [task.metadata.name for task in tasks] == list(DESCRIPTIONS)
    assert [task.metadata.type for task in tasks] == ["Retrieval", "STS", "Classification", "PairClassification"]
    assert [task.metadata.main_score for task in tasks] == ["ndcg_at_10", "cosine_spearman", "accuracy", "cosine_ap"]
    assert all(task.data_loaded for task in tasks)
    assert not any(task.data_loaded for task in wordnet_tasks(FOLDER, tmp_path, load=False))
    assert len(list(tmp_path.glob("everyday_*"))) == 1


def test_making_tasks_leaves_random_states_alone(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    drawn = []
    for make in (lambda: None, lambda: wordnet_tasks(FOLDER, tmp_path)):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        make()
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_mteb_runs_every_task_and_each_text_is_embedded_once(tiny_policy: Policy, tmp_path: Path) -> None:
    settings = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=4)
    encoder = Counting(tiny_policy, settings, HFEngine(4), rationale=False)
    scores = run_tasks(encoder, wordnet_tasks(FOLDER, tmp_path / "cache"), tmp_path / "results", "tiny")
    assert scores.failures == {}
    assert list(scores.tasks) == list(DESCRIPTIONS)
    assert list(scores.categories) == ["Retrieval", "STS", "Classification", "PairClassification"]
    assert len(encoder.seen) == len(set(encoder.seen)) == DISTINCT["small"]
    again = run_tasks(Counting(tiny_policy, settings, HFEngine(4), rationale=False), wordnet_tasks(FOLDER, tmp_path), None, "tiny")
    assert again == scores


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"everyday tasks of size 'huge' do not exist; sizes are mini, small, large"):
        wordnet_tasks(FOLDER, tmp_path, "huge")
    (tmp_path / "documents.jsonl").write_text(json.dumps({"small": True}) + "\n")
    with pytest.raises(FileNotFoundError, match=r"queries.jsonl"):
        wordnet_tasks(tmp_path, tmp_path)
