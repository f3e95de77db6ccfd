import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from src.datamodules.docstrings import Docstring, collect
from src.evaluation.tasks.offline_sets import SIZES, OfflineSize, choose, labels_of, offline_sets, overlap, reranking_rows, subpackage
from src.evaluation.tasks.offline_tasks import DESCRIPTIONS, offline_tasks
from tests.conftest import ROOT

PACKAGES = ["networkx", "rich"]
SIZE = OfflineSize(documents=80, queries=30, per_module=5, candidates=6, per_label=8)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def docs(cache_dir: Path) -> list[Docstring]:
    return collect(PACKAGES, cache_dir)


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_choice_is_the_same_every_time_and_follows_the_seed(docs: list[Docstring]) -> None:
    assert choose(docs, SIZE, seed=0) == choose(docs, SIZE, seed=0)
    assert choose(docs, SIZE, seed=0) != choose(docs, SIZE, seed=1)


def test_queries_need_more_than_shared_words_and_meet_near_misses(docs: list[Docstring]) -> None:
    chosen = choose(docs, SIZE, seed=0)
    assert (len(chosen.documents), len(chosen.queries)) == (SIZE.documents, SIZE.queries)
    assert all(overlap(query) <= 0.75 and query.summary not in query.body for query in chosen.queries)
    modules = [doc.module for doc in chosen.documents]
    alone = [query for query in chosen.queries if modules.count(query.module) < 4 and query.module != modules[-1]]
    assert alone == []  # but for the last module, which the size may cut


def test_candidates_hold_the_answer_and_the_nearest_others(docs: list[Docstring]) -> None:
    chosen = choose(docs, SIZE, seed=0)
    by_id = {doc.id: doc for doc in chosen.documents}
    for query, row in zip(chosen.queries, reranking_rows(chosen, SIZE.candidates, random.Random(0))["top_ranked"], strict=True):
        candidates = [by_id[i] for i in row["corpus-ids"]]
        assert len(candidates) == SIZE.candidates
        assert query in candidates
        siblings = {doc.id for doc in chosen.documents if doc.module == query.module}
        assert siblings <= set(row["corpus-ids"])  # at most five a module, so all of them fit
        if any(doc.package != query.package for doc in candidates):
            assert {doc.id for doc in chosen.documents if subpackage(doc) == subpackage(query)} <= set(row["corpus-ids"])


def test_too_few_docstrings_are_counted(docs: list[Docstring]) -> None:
    with pytest.raises(ValueError, match=r"the packages give \d+ documents and \d+ queries, but .* ask for 99999 and 30"):
        choose(docs, OfflineSize(99_999, 30, 5, 6, 8), seed=0)


def test_packages_without_subpackages_give_no_labels(docs: list[Docstring]) -> None:
    flat = [doc for doc in docs if doc.package == "rich"]
    with pytest.raises(ValueError, match=r"[01] subpackages have 8 texts or more, and labels need two"):
        labels_of(choose(flat, OfflineSize(30, 10, 5, 6, 8), seed=0).documents, least=8)


def test_all_sets_share_their_texts(cache_dir: Path) -> None:
    folders = offline_sets(PACKAGES, cache_dir, SIZE)
    retrieval = folders["retrieval"]
    texts = {row["text"] for name in ("corpus", "queries") for row in lines(retrieval / f"{name}.jsonl")}
    assert len(texts) == SIZE.documents + SIZE.queries
    used = {row["text"] for split in ("train", "test") for row in lines(folders["classification"] / f"{split}.jsonl")}
    used |= {row["sentences"] for row in lines(folders["clustering"] / "test.jsonl")}
    used |= {row[side] for row in lines(folders["pairs"] / "test.jsonl") for side in ("sentence1", "sentence2")}
    assert used <= texts


def test_train_and_test_of_the_classification_are_apart(cache_dir: Path) -> None:
    folder = offline_sets(PACKAGES, cache_dir, SIZE)["classification"]
    train, test = ({row["text"]: row["label"] for row in lines(folder / f"{split}.jsonl")} for split in ("train", "test"))
    assert not train.keys() & test.keys()
    assert set(train.values()) == set(test.values())
    assert len(set(test.values())) > 1


def test_sets_are_written_once_and_other_content_has_other_names(cache_dir: Path) -> None:
    first = offline_sets(PACKAGES, cache_dir, SIZE)
    written = (first["pairs"] / "test.jsonl").stat().st_mtime_ns
    assert offline_sets(PACKAGES, cache_dir, SIZE) == first
    assert (first["pairs"] / "test.jsonl").stat().st_mtime_ns == written
    other = offline_sets(PACKAGES, cache_dir, SIZE, seed=1)
    assert not {path.name for path in first.values()} & {path.name for path in other.values()}
    assert not list(cache_dir.glob("*.tmp"))


def test_mteb_reads_each_folder_as_itself(cache_dir: Path) -> None:
    """`datasets` keeps what it reads under a folder's own name: folders that shared names would be read as one."""
    one, other = (offline_tasks(PACKAGES, cache_dir, SIZE, seed=seed) for seed in (0, 1))
    queries = [set(tasks[0].dataset["default"]["test"]["queries"]["text"]) for tasks in (one, other)]  # type: ignore[index]
    for seed, read in enumerate(queries):
        folder = offline_sets(PACKAGES, cache_dir, SIZE, seed=seed)["retrieval"]
        assert read == {row["text"] for row in lines(folder / "queries.jsonl")}
    assert queries[0] != queries[1]


def test_there_is_one_task_of_each_kind_with_its_data(cache_dir: Path) -> None:
    tasks = offline_tasks(PACKAGES, cache_dir, SIZE)
    assert [task.metadata.name for task in tasks] == list(DESCRIPTIONS)
    assert [task.metadata.type for task in tasks] == ["Retrieval", "Reranking", "Classification", "Clustering", "PairClassification"]
    assert all(task.data_loaded for task in tasks)
    assert tasks[0].dataset["default"]["test"]["top_ranked"] is None  # type: ignore[index]
    assert len(tasks[1].dataset["default"]["test"]["top_ranked"]) == SIZE.queries  # type: ignore[index]
    assert len({task.metadata.dataset["revision"] for task in tasks}) == 1


@pytest.mark.parametrize("part", ["test", "validation"])
def test_held_out_packages_give_the_smallest_size(part: str) -> None:
    packages = list(OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")[part])
    folders = offline_sets(packages, ROOT / "data" / "cache", SIZES["mini"])
    assert len(lines(folders["retrieval"] / "corpus.jsonl")) == 200
    assert len(lines(folders["retrieval"] / "queries.jsonl")) == 80
    assert {len(row["corpus-ids"]) for row in lines(folders["reranking"] / "top_ranked.jsonl")} == {10}  # type: ignore[arg-type]
    assert len({row["labels"] for row in lines(folders["clustering"] / "test.jsonl")}) >= 5


def test_making_tasks_leaves_random_states_alone(cache_dir: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    offline_tasks(PACKAGES, cache_dir, SIZE)
    assert draw() == expected


def test_an_unknown_size_is_named(cache_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"size 'huge' do not exist; sizes are mini, small, large"):
        offline_tasks(PACKAGES, cache_dir, "huge")
