import json
from dataclasses import replace
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch

from src.datamodules.offline_sets import OfflineSize
from src.datamodules.offline_tasks import offline_tasks
from src.modules.encoder import RationaleEncoder
from src.modules.mteb_encoder import MTEBEncoder, describe, revision
from src.modules.policy import Policy
from src.modules.rollout_hf import HFRollouts
from src.modules.settings import EncoderSettings
from src.utils.evaluation import named_tasks, run_tasks

SETTINGS = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=4)
SIZE = OfflineSize(documents=60, queries=24, per_module=5, candidates=6, per_label=8)


class Counting(RationaleEncoder):
    """Keeps the texts that it embeds."""

    def encode(self, texts: list[str]) -> np.ndarray:  # type: ignore[override]
        self.seen = [*getattr(self, "seen", []), *texts]
        return super().encode(texts)


def encoder(policy: Policy, **options: object) -> Counting:
    return Counting(policy, SETTINGS, HFRollouts(SETTINGS.max_new_tokens), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return offline_tasks(["networkx", "rich"], tmp_path_factory.mktemp("cache"), SIZE)


def batches(*texts: list[str]) -> list[dict[str, list[str]]]:
    return [{"text": list(batch)} for batch in texts]


def embed(adapter: MTEBEncoder, inputs: object) -> np.ndarray:
    return adapter.encode(inputs, task_metadata=None, hf_split="test", hf_subset="default")  # type: ignore[arg-type]


def test_mteb_runs_every_task_on_it_and_each_text_is_embedded_once(tiny_policy: Policy, tasks: list[object], tmp_path: Path) -> None:
    own = encoder(tiny_policy)
    scores = run_tasks(own, tasks, tmp_path, "tiny")  # type: ignore[arg-type]
    assert scores.failures == {}
    assert list(scores.tasks) == [task.metadata.name for task in tasks]  # type: ignore[attr-defined]
    assert all(0 <= score <= 1 for score in scores.tasks.values())
    assert list(scores.categories) == ["Retrieval", "Reranking", "Classification", "Clustering", "PairClassification"]
    assert scores.average == pytest.approx(sum(scores.tasks.values()) / 5)
    assert scores.flat("x/")["x/average"] == scores.average
    assert len(own.seen) == len(set(own.seen)) <= SIZE.documents + SIZE.queries
    files = sorted(path.name for path in tmp_path.rglob("*.json"))
    assert files == sorted([*(f"{name}.json" for name in scores.tasks), "model_meta.json"])
    stored = json.loads(next(tmp_path.rglob("DocstringRetrieval.json")).read_text())
    assert stored["scores"]["test"][0]["main_score"] == pytest.approx(scores.tasks["DocstringRetrieval"], abs=1e-4)


def test_running_again_draws_the_same_and_reads_what_is_stored(tiny_policy: Policy, tasks: list[object], tmp_path: Path) -> None:
    first = run_tasks(encoder(tiny_policy, rationale=False), tasks, tmp_path, "tiny")  # type: ignore[arg-type]
    assert run_tasks(encoder(tiny_policy, rationale=False), tasks, None, "tiny") == first  # type: ignore[arg-type]
    again = encoder(tiny_policy, rationale=False)
    assert run_tasks(again, tasks, tmp_path, "tiny").tasks == pytest.approx(first.tasks, abs=1e-4)  # type: ignore[arg-type]
    assert not hasattr(again, "seen")


def test_stored_results_of_other_data_are_not_reused(tiny_policy: Policy, tasks: list[object], tmp_path: Path) -> None:
    run_tasks(encoder(tiny_policy, rationale=False), tasks[:1], tmp_path, "tiny")  # type: ignore[arg-type]
    other = offline_tasks(["networkx", "rich"], tmp_path, SIZE, seed=1)[:1]
    again = encoder(tiny_policy, rationale=False)
    assert run_tasks(again, other, tmp_path, "tiny") == run_tasks(encoder(tiny_policy, rationale=False), other, None, "tiny")
    assert again.seen


def test_a_failing_task_is_named_and_the_others_go_on(tiny_policy: Policy, tasks: list[object]) -> None:
    class Fails(Counting):
        def encode(self, texts: list[str]) -> np.ndarray:  # type: ignore[override]
            raise ValueError("no such luck")

    broken = Fails(tiny_policy, SETTINGS, HFRollouts(4), rationale=False)
    scores = run_tasks(broken, tasks[:2], None, "tiny")  # type: ignore[arg-type]
    assert scores.failures == {"DocstringRetrieval": "no such luck", "DocstringReranking": "no such luck"}
    assert np.isnan(scores.average)
    assert scores.flat() == {}


def test_evaluation_leaves_random_states_alone(tiny_policy: Policy, tasks: list[object]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run_tasks(encoder(tiny_policy, temperature=1.0), tasks[-1:], None, "tiny")  # type: ignore[arg-type]
    torch.testing.assert_close(torch.rand(3), expected)


def test_titles_of_documents_are_read(tiny_policy: Policy) -> None:
    from datasets import Dataset
    from mteb._create_dataloaders import create_dataloader
    from mteb.types import PromptType

    corpus = Dataset.from_list([{"id": "1", "title": "Graphs", "text": "have edges"}])
    own = encoder(tiny_policy, rationale=False)
    metadata = mteb.get_task("SciFact").metadata
    loader = create_dataloader(corpus, task_metadata=metadata, prompt_type=PromptType.document, batch_size=2)
    adapter = MTEBEncoder(own, "tiny")
    adapter.encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.document)
    assert own.seen == ["Graphs have edges"]


def test_texts_are_remembered_up_to_a_bound_and_come_in_order(tiny_policy: Policy) -> None:
    own = encoder(tiny_policy, rationale=False)
    adapter = MTEBEncoder(own, "tiny", remembered_texts=2)
    found = embed(adapter, batches(["a", "b"], ["a", "c"]))
    np.testing.assert_array_equal(found[0], found[2])
    again = embed(adapter, batches(["c", "b", "a"]))
    np.testing.assert_allclose(again, found[[3, 1, 0]], atol=1e-6)
    assert own.seen == ["a", "b", "c", "c"]


def test_what_mteb_records_is_true(tiny_policy: Policy) -> None:
    meta = describe(encoder(tiny_policy), "tiny")
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("grace/tiny", 32, 96)
    assert meta.n_parameters == sum(p.numel() for p in tiny_policy.parameters())
    assert meta.similarity_fn_name is mteb.models.model_meta.ScoringFunction.COSINE
    assert meta.revision == revision(encoder(tiny_policy))


def test_whatever_moves_an_embedding_has_a_revision_of_its_own(tiny_policy: Policy) -> None:
    engine = HFRollouts(4)
    revisions = [
        revision(encoder(tiny_policy)),
        revision(encoder(tiny_policy, rationale=False)),
        revision(encoder(tiny_policy, temperature=0.5)),
        revision(encoder(tiny_policy, temperature=0.5, seed=1)),
        revision(RationaleEncoder(tiny_policy, replace(SETTINGS, instruction="Other."), engine)),
        revision(RationaleEncoder(tiny_policy, SETTINGS, HFRollouts(5))),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        revisions.append(revision(encoder(tiny_policy)))
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight[0] += 1e-4
    revisions.append(revision(encoder(tiny_policy)))
    assert len(set(revisions)) == len(revisions)


def test_it_passes_mtebs_own_adapter_test(tiny_policy: Policy) -> None:
    results = mteb.mock_run(MTEBEncoder(encoder(tiny_policy, rationale=False), "tiny"))
    failed = {name: status.exception for name, status in results.items() if isinstance(status, mteb.results.task_result.TaskError)}
    assert failed == {}
    assert results.all_passed


def test_tasks_by_name_and_by_benchmark(tmp_path: Path) -> None:
    assert len(named_tasks(["MTEB(eng, v1)"])) == 56
    (tmp_path / "mteb" / "stsbenchmark-sts").mkdir(parents=True)
    names = {task.metadata.name: task.metadata.dataset["path"] for task in named_tasks(["STSBenchmark", "BIOSSES"], tmp_path)}
    assert names == {"STSBenchmark": str(tmp_path / "mteb/stsbenchmark-sts"), "BIOSSES": "mteb/biosses-sts"}
    with pytest.raises(ValueError, match=r"MTEB has no task or benchmark named 'STSBench'"):
        named_tasks(["STSBench"])
