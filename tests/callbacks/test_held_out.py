"""Callbacks that sample on held-out texts: rationale table, similarities, divergence from the start."""

import json
from dataclasses import replace

import lightning as L
import mlflow
import pytest
import torch

from src.callbacks.monitoring import as_policy_module, embed_triplets, fixed_triplets, last_report, undisturbed
from src.callbacks.rationale_table import Rationale, RationaleTable, _pieces, sample_rationales
from src.callbacks.similarities import SimilarityHistograms, similarities
from src.callbacks.starting_policy_kl import StartingPolicyKL, token_logprobs
from src.modules.objectives import rewards
from src.modules.objectives.rewards import Embeddings
from src.modules.types import join
from tests.callbacks.conftest import artifacts, fit, make_module, steps, triplets


def test_rationale_table(module, mlflow_logger, tmp_path):
    callback = RationaleTable(str(tmp_path / "rationales.md"), texts=3, every_n_rollout_batches=2)
    fit(module, [callback], tmp_path, batches=3, logger=mlflow_logger)
    assert artifacts(mlflow_logger, "rationales") == {"step_0.json", "step_2.json", "step_3.json", "rationales.md"}
    mlflow.set_tracking_uri(mlflow_logger._tracking_uri)
    table, last = (json.loads(mlflow.artifacts.load_text(f"runs:/{mlflow_logger.run_id}/rationales/step_{n}.json")) for n in (2, 3))
    terms = ["positive", "negative", "consistency", "hard", "total"]
    assert table["columns"] == ["step", "text", "rationale", "length", "finished", "pieces", "similarities", *terms]
    assert [list(row.rewards.values()) for row in callback.after] == [pytest.approx(row[7:]) for row in last["data"]]
    assert [row.pieces for row in callback.after] == [row[5] for row in last["data"]]
    texts = [row.text for row in callback.before]
    assert [row[1] for row in table["data"]] == texts == [row.text for row in callback.after]
    markdown = (tmp_path / "rationales.md").read_text()
    assert all(text in markdown for text in texts)
    assert markdown.count("**before**") == markdown.count("**after**") == 3


def test_rewards_are_those_of_one_more_rollout(tiny_policy):
    module, batch = make_module(tiny_policy, rewards.listwise), triplets(4)
    rows = sample_rationales(module, batch, temperature=0.0, seed=3)
    with torch.no_grad():
        group = embed_triplets(module, batch, n=3, seed=3)
        own = torch.from_numpy(module.encoder().encode([t.positive for t in batch]))
    together = torch.cat([group.positive, torch.nn.functional.normalize(own, dim=-1).unsqueeze(1)], dim=1)
    expected = rewards.listwise(replace(group, positive=together))
    assert [row.rewards["total"] for row in rows] == pytest.approx(expected.total[:, -1].tolist(), abs=1e-4)
    assert [row.rewards["to_query"] for row in rows] == pytest.approx(expected.terms["to_query"][:, -1].tolist(), abs=1e-4)
    assert [row.rationale for row in rows] == module.encoder().explain([t.positive for t in batch])[1] or not all(r.finished for r in rows)


def test_similarity_by_prefix(tiny_policy):
    """Each piece's similarity is that of the rationale cut there, embedded anew; the pieces make the whole."""
    module, batch = make_module(tiny_policy), triplets(3)
    rows = sample_rationales(module, batch, temperature=1.0, seed=1)
    with torch.no_grad():
        queries = embed_triplets(module, batch, n=3, seed=1).query
        for row, query in zip(rows, queries, strict=True):
            assert "".join(row.pieces) == row.rationale
            prompts = module.renderer([row.text])
            rollouts = module.engine.generate(module.policy, module.renderer([r.text for r in rows]), n=1, temperature=1.0, seed=1)
            ids = rollouts.rationales()[rows.index(row)]
            ends = [0]
            for piece in row.pieces:  # the fewest tokens that decode to the text so far
                so_far = module.policy.tokenizer.decode(ids[: ends[-1]]) + piece
                ends.append(next(n for n in range(ends[-1] + 1, len(ids) + 1) if module.policy.tokenizer.decode(ids[:n]) == so_far))
            for end, similarity in zip(ends, row.similarities, strict=True):
                cut = join(prompts, [ids[:end]], torch.tensor([False]), module.policy.pad_id)
                vector = torch.nn.functional.normalize(module.policy.embed(cut)[0], dim=0)
                assert similarity == pytest.approx(float(vector @ query), abs=1e-4)


def test_pieces_keep_characters_whole(tiny_policy):
    tokenizer = tiny_policy.tokenizer
    ids = tokenizer("é 日本 graph", add_special_tokens=False)["input_ids"]
    pieces, ends = _pieces(tokenizer, ids, tokenizer.decode(ids))
    assert "".join(pieces) == "é 日本 graph"
    assert "日" in pieces
    assert ends[-1] == len(ids) > len(pieces) == len(ends)
    cut = tokenizer("日", add_special_tokens=False)["input_ids"][:-1]  # the length limit may fall within a character
    assert _pieces(tokenizer, cut, tokenizer.decode(cut)) == (["\ufffd"], [len(cut)])
    assert _pieces(tokenizer, [], "") == ([], [])


def test_single_record_has_no_rewards(module, tmp_path, caplog):
    callback = RationaleTable(str(tmp_path / "r.md"), texts=1)
    fit(module, [callback], tmp_path)
    assert [row.rewards for row in callback.after] == [{}]
    assert "one record is held out" in caplog.text


def test_resumed_with_other_texts_has_no_page(tiny_policy, tmp_path, caplog):
    first, wider = RationaleTable(str(tmp_path / "a.md"), texts=2), RationaleTable(str(tmp_path / "b.md"), texts=4)
    fit(make_module(tiny_policy), [first], tmp_path)
    assert (tmp_path / "a.md").exists()
    wider.load_state_dict(first.state_dict())
    fit(make_module(tiny_policy), [wider], tmp_path)
    assert "the held-out texts are not those of the start" in caplog.text
    assert len(wider.after) == 4
    again = RationaleTable(str(tmp_path / "c.md"), texts=4)  # its texts are those of the stop, but the policy is not that of the start
    again.load_state_dict(wider.state_dict())
    fit(make_module(tiny_policy), [again], tmp_path)
    assert not list(tmp_path.glob("[bc].md"))


def test_rationales_of_earlier_checkpoints_are_read(tmp_path):
    callback, row = RationaleTable(str(tmp_path / "r.md")), Rationale("text", "why", 2, True, {"total": 0.5})
    saved = {"earned" if name == "rewards" else name: value for name, value in vars(row).items()}
    callback.load_state_dict({"before": [saved], "from_start": True})
    assert callback.before == [row]


def test_similarities_by_kind_of_pair():
    query, positive = torch.eye(2), torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]])
    found = similarities(Embeddings(query, positive, torch.tensor([[[0.0, 1.0]], [[0.8, 0.6]]])))
    assert found["positive"] == pytest.approx([1.0, 0.8])
    assert found["hard negative"] == pytest.approx([0.0, 0.6])
    assert found["unrelated"] == pytest.approx([0.6, 0.0])
    assert "hard negative" not in similarities(Embeddings(query, positive, torch.zeros(2, 0, 2)))
    alike = Embeddings(query, positive, torch.zeros(2, 0, 2), same=torch.ones(2, 2, dtype=torch.bool))  # the two share a text
    assert "unrelated" not in similarities(alike)


def test_similarity_histograms(module, mlflow_logger, tmp_path):
    callback, resumed = SimilarityHistograms(str(tmp_path / "out" / "similarities.png"), records=4), SimilarityHistograms()
    fit(module, [callback], tmp_path, batches=2, logger=mlflow_logger)
    assert artifacts(mlflow_logger, "similarities") == {"step_0.json", "step_2.json"}
    assert {kind: len(values) for kind, values in callback.before.items()} == {
        "positive": 4,
        "hard negative": 4,
        "unrelated": 8,
    }  # two pairs of instances share a text
    assert (tmp_path / "out" / "similarities.png").read_bytes().startswith(b"\x89PNG")
    resumed.load_state_dict(callback.state_dict())
    assert resumed.before == callback.before


def test_kl_grows_from_zero(fresh_module, mlflow_logger, tmp_path):
    kl, module = StartingPolicyKL(texts=6, every_n_rollout_batches=1), fresh_module()
    with pytest.raises(RuntimeError, match="when training starts"):
        kl.divergence(module)
    fit(module, [kl], tmp_path, batches=3, logger=mlflow_logger)
    assert steps(mlflow_logger, "kl/from_start") == [1, 2, 3]
    last = mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "kl/from_start")[-1].value
    assert last == pytest.approx(kl.divergence(module))
    assert last > 0.01
    torch.testing.assert_close(token_logprobs(fresh_module().policy, kl._rollouts, 2), kl._start, atol=1e-5, rtol=0)


class Recorder(L.Callback):
    """Keeps the weights after each rollout batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))


def test_monitoring_changes_no_weight(fresh_module, tmp_path):
    alone, monitored = Recorder(), Recorder()
    callbacks = [StartingPolicyKL(texts=2, every_n_rollout_batches=1), RationaleTable(str(tmp_path / "r.md"), 2, 1)]
    for recorder, others in ((alone, []), (monitored, callbacks)):
        L.seed_everything(0)
        fit(fresh_module(), [*others, recorder], tmp_path, batches=3)
    assert len(alone.weights) == 3
    assert all(torch.equal(a, m) for a, m in zip(alone.weights, monitored.weights, strict=True))


def test_undisturbed_restores_mode_and_randomness(module):
    module.policy.train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with undisturbed(module):
        assert not module.policy.training
        torch.rand(5)
        assert not torch.is_grad_enabled()
    assert module.policy.training
    assert torch.equal(torch.rand(1), expected)


def test_other_modules_and_data_are_named(module):
    with pytest.raises(TypeError, match="module=contrastive, not LightningModule"):
        as_policy_module(L.LightningModule())
    with pytest.raises(RuntimeError, match="no batch"):
        last_report(module)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = None
    with pytest.raises(ValueError, match="fixed_triplets"):
        fixed_triplets(trainer, 2)
