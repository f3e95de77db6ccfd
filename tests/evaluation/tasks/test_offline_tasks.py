"""Tasks that need no hub: of docstrings, and of WordNet's glosses."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from src.datamodules.docstrings import Docstring, collect
from src.evaluation.tasks.offline_tasks import (
    SIZES,
    OfflineSize,
    candidates,
    choose,
    labels_of,
    offline_sets,
    offline_tasks,
    overlap,
    subpackage,
)
from src.evaluation.tasks.wordnet_tasks import read_rows, wordnet_sets, wordnet_tasks
from tests.conftest import ROOT

PACKAGES = ["networkx", "rich"]
SIZE = OfflineSize(documents=80, queries=30, per_module=5, candidates=6, per_label=8)
WORDNET = ROOT / "experiments" / "everyday_english" / "data"
WORDNET_TEXTS = {"small": 210, "large": 1469}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def docs(cache_dir: Path) -> list[Docstring]:
    return collect(PACKAGES, cache_dir)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- both


def docstrings_of(cache_dir: Path, size: Any = SIZE, load: bool = True) -> list[Any]:
    return offline_tasks(PACKAGES, cache_dir, size, load=load)


def glosses_of(cache_dir: Path, size: Any = "small", load: bool = True) -> list[Any]:
    return wordnet_tasks(WORDNET, cache_dir, size, load=load)


BOTH = pytest.mark.parametrize("make", [docstrings_of, glosses_of])
EXPECTED = {
    docstrings_of: {
        "DocstringRetrieval": ("Retrieval", "ndcg_at_10"),
        "DocstringReranking": ("Reranking", "map_at_1000"),
        "DocstringClassification": ("Classification", "accuracy"),
        "DocstringClustering": ("Clustering", "v_measure"),
        "DocstringPairs": ("PairClassification", "cosine_ap"),
    },
    glosses_of: {
        "WordNetRetrieval": ("Retrieval", "ndcg_at_10"),
        "WordNetSimilarity": ("STS", "cosine_spearman"),
        "WordNetClassification": ("Classification", "accuracy"),
        "WordNetPairs": ("PairClassification", "cosine_ap"),
    },
}


@BOTH
def test_tasks_of_each_kind(make, cache_dir):
    tasks = make(cache_dir)
    assert {task.metadata.name: (task.metadata.type, task.metadata.main_score) for task in tasks} == EXPECTED[make]
    assert all(task.data_loaded for task in tasks)
    assert len({task.metadata.dataset["revision"] for task in tasks}) == 1
    assert not any(task.data_loaded for task in make(cache_dir, load=False))


@BOTH
def test_random_states_are_left_alone(make, cache_dir):
    drawn = []
    for step in (lambda: None, lambda: make(cache_dir)):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        step()
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


# ---- docstrings


def test_choice_follows_the_seed(docs):
    assert choose(docs, SIZE, seed=0) == choose(docs, SIZE, seed=0)
    assert choose(docs, SIZE, seed=0) != choose(docs, SIZE, seed=1)


def test_queries_have_near_misses(docs):
    chosen = choose(docs, SIZE, seed=0)
    assert (len(chosen.documents), len(chosen.queries)) == (SIZE.documents, SIZE.queries)
    assert all(overlap(query) <= 0.75 and query.summary not in query.body for query in chosen.queries)
    modules = [doc.module for doc in chosen.documents]
    assert all(modules.count(query.module) >= 4 for query in chosen.queries if query.module != modules[-1])  # the size may cut the last


def test_candidates_are_the_nearest(docs):
    chosen = choose(docs, SIZE, seed=0)
    by_id = {doc.id: doc for doc in chosen.documents}
    for query, row in zip(chosen.queries, candidates(chosen, SIZE.candidates, random.Random(0)), strict=True):
        found = [by_id[id] for id in row["corpus-ids"]]
        assert len(found) == SIZE.candidates
        assert query in found
        assert all(doc in found for doc in chosen.documents if doc.module == query.module)  # at most five a module, so all of them fit
        if any(doc.package != query.package for doc in found):
            assert all(doc in found for doc in chosen.documents if subpackage(doc) == subpackage(query))


def test_too_few_docstrings_or_labels(docs):
    with pytest.raises(ValueError, match=r"give \d+ documents and \d+ queries.* 99999 and 30"):
        choose(docs, OfflineSize(99_999, 30, 5, 6, 8), seed=0)
    flat = [doc for doc in docs if doc.package == "rich"]
    with pytest.raises(ValueError, match=r"[01] subpackages have 8 texts"):
        labels_of(choose(flat, OfflineSize(30, 10, 5, 6, 8), seed=0).documents, least=8)


def test_docstring_sets_share_texts(cache_dir):
    folders = offline_sets(PACKAGES, cache_dir, SIZE)
    texts = {row["text"] for name in ("corpus", "queries") for row in lines(folders["retrieval"] / f"{name}.jsonl")}
    assert len(texts) == SIZE.documents + SIZE.queries
    train, test = (
        {row["text"]: row["label"] for row in lines(folders["classification"] / f"{split}.jsonl")} for split in ("train", "test")
    )
    assert not train.keys() & test.keys()
    assert len(set(train.values())) > 1
    assert set(train.values()) == set(test.values())
    used = train.keys() | test.keys() | {row["sentences"] for row in lines(folders["clustering"] / "test.jsonl")}
    used |= {row[name] for row in lines(folders["pairs"] / "test.jsonl") for name in ("sentence1", "sentence2")}
    assert used <= texts


def test_sets_are_written_once(cache_dir):
    first = offline_sets(PACKAGES, cache_dir, SIZE)
    written = (first["pairs"] / "test.jsonl").stat().st_mtime_ns
    assert offline_sets(PACKAGES, cache_dir, SIZE) == first
    assert (first["pairs"] / "test.jsonl").stat().st_mtime_ns == written
    other = offline_sets(PACKAGES, cache_dir, SIZE, seed=1)
    assert not {path.name for path in first.values()} & {path.name for path in other.values()}


def test_mteb_reads_each_folder_as_itself(cache_dir):
    """`datasets` caches what it reads under the name of a folder: folders of one name would be read as one."""
    for seed in (0, 1):
        retrieval, reranking, *_ = offline_tasks(PACKAGES, cache_dir, SIZE, seed=seed)
        found = retrieval.dataset["default"]["test"]
        folder = offline_sets(PACKAGES, cache_dir, SIZE, seed=seed)["retrieval"]
        assert set(found["queries"]["text"]) == {row["text"] for row in lines(folder / "queries.jsonl")}
        assert found["top_ranked"] is None
        assert len(reranking.dataset["default"]["test"]["top_ranked"]) == SIZE.queries


@pytest.mark.parametrize("part", ["test", "validation"])
def test_held_out_packages_suffice(part):
    packages = list(OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")[part])
    folders = offline_sets(packages, ROOT / "data" / "cache", SIZES["mini"])
    assert len(lines(folders["retrieval"] / "corpus.jsonl")) == 200
    assert len(lines(folders["retrieval"] / "queries.jsonl")) == 80
    assert {len(row["corpus-ids"]) for row in lines(folders["reranking"] / "top_ranked.jsonl")} == {10}
    assert len({row["labels"] for row in lines(folders["clustering"] / "test.jsonl")}) >= 5


# ---- WordNet


@pytest.mark.parametrize("size", ["small", "large"])
def test_wordnet_sets(size):
    rows = read_rows(WORDNET, size)
    sets = wordnet_sets(rows)
    fields = ("text", "sentence1", "sentence2")
    texts = {name: {row[key] for part in own.values() for row in part for key in fields if key in row} for name, own in sets.items()}
    assert all(found <= texts["retrieval"] for found in texts.values())
    assert len(texts["retrieval"]) == WORDNET_TEXTS[size]
    assert max(map(len, texts["retrieval"])) <= 160
    train, test = ({row["text"]: row["label"] for row in sets["classification"][split]} for split in ("train", "test"))
    assert not train.keys() & test.keys()
    for labels in (train, test):
        counts = np.bincount(list(labels.values()))
        assert len(counts) == 15
        assert len(set(counts)) == 1
    ids = {doc["id"] for doc in rows["documents"]}
    for row in rows["queries"] + rows["pairs"]:
        one, other = (row[name] for name in (("answer", "rival") if "answer" in row else ("one", "other")))
        assert {one, other} <= ids
        assert one != other
    assert [row["labels"] for row in sets["pairs"]["test"]] == [1, 0] * len(rows["queries"])


def test_wordnet_sizes_are_nested():
    small, large = read_rows(WORDNET, "small"), read_rows(WORDNET, "large")
    assert read_rows(WORDNET, "mini") == small
    assert all([row for row in large[name] if row["small"]] == rows for name, rows in small.items())
    assert all(0 < len(rows) < len(large[name]) for name, rows in small.items())


def test_missing_wordnet_file(tmp_path):
    (tmp_path / "documents.jsonl").write_text(json.dumps({"small": True}) + "\n")
    with pytest.raises(FileNotFoundError, match=r"queries.jsonl"):
        wordnet_tasks(tmp_path, tmp_path)
