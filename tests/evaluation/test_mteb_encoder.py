import json
import re
from dataclasses import replace
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from mteb.types import PromptType

from src.evaluation.fingerprint import revision
from src.evaluation.mteb_encoder import MTEBEncoder, describe
from src.evaluation.run_tasks import EvaluationStoppedError, run_tasks
from src.evaluation.tasks.offline_tasks import OfflineSize, offline_tasks
from src.modules.encoder.encoder import WRITTEN_AT_A_TIME
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from tests.evaluation.builders import SETTINGS, Recording, encoder

SIZE = OfflineSize(documents=60, queries=24, per_module=5, candidates=6, per_label=8)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return offline_tasks(["networkx", "rich"], tmp_path_factory.mktemp("cache"), SIZE)


def batches(*texts: list[str]) -> list[dict[str, list[str]]]:
    return [{"text": list(batch)} for batch in texts]


def embed(adapter: MTEBEncoder, inputs: object) -> np.ndarray:
    return adapter.encode(inputs, task_metadata=None, hf_split="test", hf_subset="default")


def test_each_text_is_embedded_once(tiny_policy, tasks, tmp_path):
    own = encoder(tiny_policy)
    scores = run_tasks(own, tasks, tmp_path, "tiny")
    assert scores.failures == {}
    assert list(scores.tasks) == [task.metadata.name for task in tasks]
    assert all(0 <= score <= 1 for score in scores.tasks.values())
    assert list(scores.categories) == ["Retrieval", "Reranking", "Classification", "Clustering", "PairClassification"]
    assert scores.average == pytest.approx(sum(scores.tasks.values()) / 5)
    assert scores.flat("x/")["x/average"] == scores.average
    assert len(own.seen) == len(set(own.seen)) <= SIZE.documents + SIZE.queries
    files = sorted(path.name for path in tmp_path.rglob("*.json"))
    assert files == sorted([*(f"{name}.json" for name in scores.tasks), "model_meta.json"])
    stored = json.loads(next(tmp_path.rglob("DocstringRetrieval.json")).read_text())
    assert stored["scores"]["test"][0]["main_score"] == pytest.approx(scores.tasks["DocstringRetrieval"], abs=1e-4)


def test_second_run_reads_stored_results(tiny_policy, tasks, tmp_path):
    first = run_tasks(encoder(tiny_policy, rationale=False), tasks, tmp_path, "tiny")
    assert run_tasks(encoder(tiny_policy, rationale=False), tasks, None, "tiny") == first
    again = encoder(tiny_policy, rationale=False)
    assert run_tasks(again, tasks, tmp_path, "tiny").tasks == pytest.approx(first.tasks, abs=1e-4)
    assert again.seen == []


def test_results_of_other_data_are_not_reused(tiny_policy, tasks, tmp_path):
    run_tasks(encoder(tiny_policy, rationale=False), tasks[:1], tmp_path, "tiny")
    other = offline_tasks(["networkx", "rich"], tmp_path, SIZE, seed=1)[:1]
    again = encoder(tiny_policy, rationale=False)
    assert run_tasks(again, other, tmp_path, "tiny") == run_tasks(encoder(tiny_policy, rationale=False), other, None, "tiny")
    assert again.seen


def test_failing_tasks_are_named(tiny_policy, tasks):
    class Fails(Recording):
        def encode(self, texts, prompt_type=None):
            raise ValueError("no such luck")

    broken = Fails(tiny_policy, SETTINGS, HFEngine(4), rationale=False)
    scores = run_tasks(broken, tasks[:2], None, "tiny")
    assert scores.failures == {"DocstringRetrieval": "no such luck", "DocstringReranking": "no such luck"}
    assert scores.without_data == ()
    assert np.isnan(scores.average)
    assert scores.flat() == {}


def test_random_states_stay(tiny_policy, tasks):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run_tasks(encoder(tiny_policy, temperature=1.0), tasks[-1:], None, "tiny")
    torch.testing.assert_close(torch.rand(3), expected)


def test_prompt_types_reach_the_encoder(tiny_policy):
    own = encoder(tiny_policy, replace(SETTINGS, query_instruction="Find what answers this."))
    adapter, text = MTEBEncoder(own, "tiny"), batches(["a graph"])
    document, query, neither = (
        adapter.encode(text, task_metadata=None, hf_split="test", hf_subset="default", prompt_type=prompt_type)
        for prompt_type in (PromptType.document, PromptType.query, None)
    )
    assert own.prompt_types == ["document", "query"]  # a text without a type is a document, and cached as one
    np.testing.assert_array_equal(document, neither)
    assert np.abs(query - document).max() > 1e-3


MIXED = ["a graph", "Draw random samples from a normal distribution.", "the table", "Split the text into words and count them.", "x " * 60]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vector_is_same_in_any_batch(tiny_policy, temperature, tmp_path, monkeypatch):
    def adapter(texts_at_a_time, folder):
        monkeypatch.setitem(WRITTEN_AT_A_TIME, "cpu", texts_at_a_time)
        return MTEBEncoder(encoder(tiny_policy, temperature=temperature), "tiny", folder)

    mixed = embed(adapter(3, tmp_path), batches(MIXED))
    alone = [embed(adapter(1, None), batches([text])) for text in MIXED]
    np.testing.assert_allclose(np.concatenate(alone), mixed, atol=1e-5)
    restarted = adapter(2, tmp_path)
    np.testing.assert_array_equal(embed(restarted, batches(MIXED[::-1])), mixed[::-1])
    assert restarted.model.seen == []
    assert embed(restarted, []).shape == (0, 32)


def test_long_call_is_cached_in_parts(tiny_policy, tmp_path, caplog, monkeypatch):
    class Stops(Recording):
        def encode(self, texts, prompt_type=None):
            if "stop" in texts:
                raise KeyboardInterrupt
            return super().encode(texts, prompt_type)

    monkeypatch.setattr("src.evaluation.mteb_encoder.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setitem(WRITTEN_AT_A_TIME, "cpu", 1)
    texts = [f"{'long ' * 5}{i}" for i in range(8)] + ["stop"]
    with caplog.at_level("INFO", "src.evaluation.mteb_encoder"), pytest.raises(KeyboardInterrupt):
        embed(MTEBEncoder(Stops(tiny_policy, SETTINGS, HFEngine(4)), "tiny", tmp_path), batches(texts))
    assert [re.sub(r"about .* left", "left", record.message) for record in caplog.records] == [
        "test: 4 of 9 texts embedded, left",
        "test: 8 of 9 texts embedded, left",
    ]
    own = encoder(tiny_policy)
    embed(MTEBEncoder(own, "tiny", tmp_path), batches(texts))
    assert own.seen == ["stop"]


def test_model_meta(tiny_policy):
    meta = describe(encoder(tiny_policy), "tiny")
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("grace/tiny", 32, 96)
    assert meta.n_parameters == sum(p.numel() for p in tiny_policy.parameters())
    assert meta.similarity_fn_name is mteb.models.model_meta.ScoringFunction.COSINE
    assert meta.memory_usage_mb == pytest.approx(4 * meta.n_parameters / 2**20)
    assert meta.revision == revision(encoder(tiny_policy))
    assert meta.experiment_kwargs == {"rationale": "greedy", "max_new_tokens": 4}
    assert describe(encoder(tiny_policy, rationale=False), "me/tiny").experiment_kwargs == {"rationale": "none"}
    assert describe(encoder(tiny_policy, rationale=False), "me/tiny").name == "me/tiny"


def test_mteb_tabulates_stored_results(tiny_policy, tasks, tmp_path):
    for rationale in (False, True):
        run_tasks(encoder(tiny_policy, rationale=rationale), tasks[:1], tmp_path, "me/tiny")
    found = mteb.ResultCache(tmp_path).load_results(load_experiments="match_name", require_model_meta=True)
    frame = found.to_dataframe()
    assert len(frame.columns) == 3  # the task's name, and a column for each way to write rationales
    assert {result.experiment_name for result in found.model_results} == {"rationale_none", "max_new_tokens_4__rationale_greedy"}
    assert {result.model_name for result in found.model_results} == {"me/tiny"}


def test_mteb_mock_run(tiny_policy):
    results = mteb.mock_run(MTEBEncoder(encoder(tiny_policy, rationale=False), "tiny"))
    failed = {name: status.exception for name, status in results.items() if isinstance(status, mteb.results.task_result.TaskError)}
    assert failed == {}
    assert results.all_passed


def test_one_pass_embeds_with_and_without(tiny_policy, tmp_path):
    texts = ["a graph", "a table of numbers", "the sorted copy of a list, which is longer"]
    with MTEBEncoder(encoder(tiny_policy), "tiny", tmp_path, also_without=True) as adapter:
        embed(adapter, batches(texts))
    plain = encoder(tiny_policy, rationale=False)
    expected = encoder(tiny_policy, rationale=False).encode(texts)
    with MTEBEncoder(plain, "tiny", tmp_path) as adapter:
        np.testing.assert_allclose(embed(adapter, batches(texts)), expected, atol=1e-5)
    assert plain.seen == []  # all of them were there


def test_one_side_shares_the_others_embeddings(tiny_policy, tasks, tmp_path):
    """Rationales of queries alone: queries of the encoder with rationales, all other texts of the one without."""
    with MTEBEncoder(encoder(tiny_policy), "tiny", tmp_path, also_without=True) as adapter:
        embed(adapter, batches(MIXED))
    own = encoder(tiny_policy, rationale="query")
    with MTEBEncoder(own, "tiny", tmp_path) as adapter:
        arguments = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
        found = {
            role: adapter.encode(batches(MIXED), prompt_type=role, **arguments) for role in (PromptType.query, PromptType.document, None)
        }
    assert own.seen == []
    np.testing.assert_allclose(found[PromptType.query], encoder(tiny_policy).encode(MIXED), atol=1e-5)
    for role in (PromptType.document, None):
        np.testing.assert_allclose(found[role], encoder(tiny_policy, rationale=False).encode(MIXED), atol=1e-5)
    scores = {side: run_tasks(encoder(tiny_policy, rationale=side), tasks, tmp_path, "tiny").tasks for side in ("query", "none", "both")}
    assert scores["query"]["DocstringClustering"] == scores["none"]["DocstringClustering"] != scores["both"]["DocstringClustering"]
    assert scores["query"]["DocstringRetrieval"] not in (scores["none"]["DocstringRetrieval"], scores["both"]["DocstringRetrieval"])


def test_stop_before_a_task(tiny_policy, tasks):
    answers = iter([False, True])
    with pytest.raises(EvaluationStoppedError, match=f"stopped before {tasks[1].metadata.name}, 2 of 2"):
        run_tasks(encoder(tiny_policy, rationale=False), tasks[:2], None, "tiny", stop=lambda: next(answers))


@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_encode_both(tiny_policy, pooling, layer):
    policy = Policy(tiny_policy.model, tiny_policy.tokenizer, "live", pooling, layer)
    own = encoder(policy, replace(SETTINGS, pooling=pooling, layer=layer))
    texts = ["a graph", "a table of numbers", "a graph"]
    with_rationales, plain = own.encode_both(texts)
    np.testing.assert_allclose(with_rationales, own.encode(texts), atol=1e-5)
    np.testing.assert_allclose(plain, own.encode(texts, rationale=False), atol=1e-5)


def test_encode_both_of_a_frozen_encoder(tiny_policy):
    frozen = Policy(tiny_policy.model, tiny_policy.tokenizer, "frozen")
    assert encoder(frozen).encode_both(["a graph"])[1] is None


def test_embedded_in_bfloat16_scored_in_float32(tiny_policy, tasks, tmp_path):
    """Autocast would round MTEB's cosines too, and texts that lie close together would tie."""
    seen = {"embedded": set(), "compared": set()}

    class Compared(MTEBEncoder):
        def similarity(self, first, second):
            found = super().similarity(first, second)
            seen["compared"].add(found.dtype)
            return found

    own = encoder(tiny_policy, rationale=False, bf16=True)
    tiny_policy.model.base_model.register_forward_hook(lambda *_: seen["embedded"].add(torch.is_autocast_enabled("cpu")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.evaluation.mteb_encoder.MTEBEncoder", Compared)
        scores = run_tasks(own, tasks[:1], tmp_path, "tiny")
    assert scores.failures == {}
    assert seen == {"embedded": {True}, "compared": {torch.float32}}
