"""The callbacks that look at the policy: rationales, distance from the start, checkpoints, progress."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import lightning as L
import mlflow
import pytest
import torch

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.monitoring import as_policy_module, last_report
from src.callbacks.probe import embed_sides, fixed_triplets, undisturbed
from src.callbacks.progress import RolloutProgress, clock
from src.callbacks.rationale_table import RationaleTable, write_rationales
from src.callbacks.reward_diagnostics import RewardDiagnostics
from src.callbacks.similarities import SimilarityHistograms, similarities
from src.callbacks.starting_policy_kl import StartingPolicyKL, score
from src.modules.grace import GRACE
from src.modules.objectives import rewards
from src.modules.policy.model import Policy
from src.modules.training.finite import NonFiniteError
from src.modules.types import Embeddings, Reward
from src.utils.checkpoint_io import read_checkpoint
from src.utils.run_logger import RunLogger
from tests.callbacks.conftest import Interrupt, fit, make_module, triplets


class Recorder(L.Callback):
    """Keeps the weights after each rollout batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))


def test_rationale_table(module: GRACE, mlflow_logger: RunLogger, tmp_path: Path) -> None:
    callback = RationaleTable(str(tmp_path / "rationales.md"), texts=3, every_n_rollout_batches=2)
    fit(module, [callback], tmp_path, batches=3, logger=mlflow_logger)
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    files = {Path(file.path).name for file in client.list_artifacts(run_id, "rationales")}
    assert files == {"step_0.json", "step_2.json", "step_3.json", "rationales.md"}
    mlflow.set_tracking_uri(mlflow_logger._tracking_uri)
    table, last = (json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/rationales/step_{step}.json")) for step in (2, 3))
    terms = ["positive", "negative", "consistency", "hard", "total"]
    assert table["columns"] == ["step", "text", "rationale", "length", "finished", *terms]
    assert [list(row.earned.values()) for row in callback.after] == [pytest.approx(row[5:]) for row in last["data"]]
    texts = [row.text for row in callback.before]
    assert [row[1] for row in table["data"]] == texts == [row.text for row in callback.after]
    markdown = (tmp_path / "rationales.md").read_text()
    assert all(text in markdown for text in texts)
    assert markdown.count("**before**") == markdown.count("**after**") == 3


def test_a_rationale_earns_what_it_would_as_one_more_of_its_group(tiny_policy: Policy) -> None:
    module, batch = make_module(tiny_policy, rewards.listwise), triplets(4)
    rows = write_rationales(module, batch, temperature=0.0, seed=3)
    with torch.no_grad():
        group = embed_sides(module, batch, n=3, seed=3)
        own = torch.from_numpy(module.encoder().encode([t.positive for t in batch]))
    together = torch.cat([group.positive, torch.nn.functional.normalize(own, dim=-1).unsqueeze(1)], dim=1)
    expected = rewards.listwise(replace(group, positive=together))
    assert [row.earned["total"] for row in rows] == pytest.approx(expected.total[:, -1].tolist(), abs=1e-4)
    assert [row.earned["to_query"] for row in rows] == pytest.approx(expected.terms["to_query"][:, -1].tolist(), abs=1e-4)
    assert [row.rationale for row in rows] == module.encoder().explain([t.positive for t in batch])[1] or not all(r.finished for r in rows)


def test_a_single_record_is_watched_without_rewards(tiny_policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = RationaleTable(str(tmp_path / "r.md"), texts=1)
    with caplog.at_level(logging.WARNING):
        fit(make_module(tiny_policy), [callback], tmp_path)
    assert [row.earned for row in callback.after] == [{}]
    assert "one record is held out" in caplog.text


def test_similarities_by_kind_of_pair() -> None:
    query, positive = torch.eye(2), torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]])
    found = similarities(Embeddings(query, positive, torch.tensor([[[0.0, 1.0]], [[0.8, 0.6]]])))
    assert found["positive"] == pytest.approx([1.0, 0.8])
    assert found["hard negative"] == pytest.approx([0.0, 0.6])
    assert found["unrelated"] == pytest.approx([0.6, 0.0])
    assert "hard negative" not in similarities(Embeddings(query, positive, torch.zeros(2, 0, 2)))


def test_similarity_histograms(module: GRACE, mlflow_logger: RunLogger, tmp_path: Path) -> None:
    callback = SimilarityHistograms(str(tmp_path / "out" / "similarities.png"), records=4)
    fit(module, [callback], tmp_path, batches=2, logger=mlflow_logger)
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    assert {Path(file.path).name for file in client.list_artifacts(run_id, "similarities")} == {"step_0.json", "step_2.json"}
    assert {kind: len(values) for kind, values in callback.before.items()} == {"positive": 4, "hard negative": 4, "unrelated": 12}
    assert (tmp_path / "out" / "similarities.png").read_bytes().startswith(b"\x89PNG")
    resumed = SimilarityHistograms()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.before == callback.before


def test_kl_is_zero_at_the_start_and_grows(module: GRACE, mlflow_logger: RunLogger, tmp_path: Path) -> None:
    kl = StartingPolicyKL(texts=6, every_n_rollout_batches=1, batch_size=4)
    fit(module, [RewardDiagnostics(), kl], tmp_path, batches=3, logger=mlflow_logger)
    logged = mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "kl/from_start")
    assert [metric.step for metric in logged] == [1, 2, 3]
    assert logged[-1].value == pytest.approx(kl.divergence(module))
    assert logged[-1].value > 0.01


def test_kl_scores_the_tokens_that_the_starting_policy_wrote(tiny_policy: Policy, tmp_path: Path) -> None:
    module = make_module(tiny_policy)
    kl = StartingPolicyKL(texts=6)
    fit(module, [kl], tmp_path, batches=1)
    assert kl._rollouts is not None
    assert kl._start is not None
    # the same weights as at the start: no divergence at all
    start = Policy.load(tiny_policy.model.name_or_path)
    torch.testing.assert_close(score(start, kl._rollouts, 2), kl._start, atol=1e-5, rtol=0)


def test_kl_before_training_is_an_error(module: GRACE) -> None:
    with pytest.raises(RuntimeError, match="written nothing yet"):
        StartingPolicyKL().divergence(module)


def test_looking_on_changes_nothing(tiny_policy_folder: Path, tmp_path: Path) -> None:
    alone, watched = Recorder(), Recorder()
    looking_on = [StartingPolicyKL(texts=2, every_n_rollout_batches=1), RationaleTable(str(tmp_path / "r.md"), 2, 1)]
    for recorder, others in ((alone, []), (watched, looking_on)):
        L.seed_everything(0)
        fit(make_module(Policy.load(str(tiny_policy_folder))), [*others, recorder], tmp_path, batches=3)
    assert len(alone.weights) == 3
    assert all(torch.equal(a, w) for a, w in zip(alone.weights, watched.weights, strict=True))


def test_undisturbed_restores_mode_and_randomness(module: GRACE) -> None:
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


def test_checkpoints_hold_what_a_resumed_run_needs(tiny_policy_folder: Path, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        return [
            RewardDiagnostics(),
            StartingPolicyKL(texts=2, every_n_rollout_batches=1),
            RationaleTable(str(tmp_path / "r.md"), texts=2, every_n_rollout_batches=0),
            RolloutCheckpoint(str(tmp_path / "checkpoints"), every_n_rollout_batches=2),
        ]

    first, resumed = (make_module(Policy.load(str(tiny_policy_folder))) for _ in range(2))
    whole, again = callbacks(), callbacks()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(first, [*whole, Interrupt(at=3)], tmp_path, batches=5)
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["batch_2.ckpt", "last.ckpt"]
    fit(resumed, again, tmp_path, batches=5, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert resumed.rollout_batches == 5  # 2 from the checkpoint and 3 more
    assert again[2].before == whole[2].before  # type: ignore[attr-defined]
    assert torch.equal(again[1]._start, whole[1]._start)  # type: ignore[attr-defined]
    assert again[0].history["total"].steps == [1, 2, 3, 4, 5]  # type: ignore[attr-defined]


def test_last_checkpoint_is_from_before_a_bad_batch(module: GRACE, tmp_path: Path) -> None:
    reward = module.reward

    def poisoned(embeddings: Embeddings) -> Reward:
        good = reward(embeddings)
        return replace(good, total=good.total / 0.0) if module.rollout_batches == 2 else good

    module.reward = poisoned
    with pytest.raises(NonFiniteError, match="batch 2, records t0, t1"):
        fit(module, [RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=1)], tmp_path, batches=3)
    last = read_checkpoint(tmp_path / "c" / "last.ckpt")
    assert last["grace"]["rollout_batches"] == 2
    assert all(torch.isfinite(weight).all() for weight in last["state_dict"].values())


def test_progress_in_a_log_is_a_few_lines(module: GRACE, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="src.callbacks.progress"):
        fit(module, [RolloutProgress(seconds_between_lines=1000)], tmp_path, batches=4)
    lines = [record.message for record in caplog.records if record.name == "src.callbacks.progress"]
    assert [line.split("  ")[0] for line in lines] == ["rollout batch 1/4", "rollout batch 4/4"]
    assert all(word in lines[0] for word in ("reward", "tokens/s", "left"))
    assert lines[-1].endswith("0:00 left")


def test_progress_after_a_resume_counts_this_process_s_time_and_batches(
    tiny_policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=1), Interrupt(at=5)]
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(make_module(Policy.load(str(tiny_policy_folder))), callbacks, tmp_path, batches=8)
    with caplog.at_level(logging.INFO, logger="src.callbacks.progress"):
        module, checkpoint = make_module(Policy.load(str(tiny_policy_folder))), str((tmp_path / "c" / "last.ckpt").resolve())
        fit(module, [RolloutProgress(seconds_between_lines=1000)], tmp_path, batches=8, ckpt_path=checkpoint)
    lines = [record.message for record in caplog.records if record.name == "src.callbacks.progress"]
    assert [line.split("  ")[0] for line in lines] == ["rollout batch 6/8", "rollout batch 8/8"]
    times = [word.split()[0].split(":") for word in lines[0].split("  ")[-1].split(", ")]
    gone, left = (60 * int(minutes) + int(seconds) for minutes, seconds in times)  # none is an hour, as since the machine was started
    assert left == pytest.approx(2 * gone, abs=2)


def test_progress_in_a_terminal_is_a_bar(
    module: GRACE, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    fit(module, [RolloutProgress()], tmp_path, batches=2)
    shown = capsys.readouterr().out
    assert "reward=" in shown
    assert "tokens/s=" in shown
    assert "2/2" in shown


def test_clock() -> None:
    assert [clock(5), clock(65), clock(3661)] == ["0:05", "1:05", "1:01:01"]


def test_other_modules_are_refused_in_one_line(module: GRACE) -> None:
    with pytest.raises(TypeError, match="module=grace, not LightningModule"):
        as_policy_module(L.LightningModule())
    with pytest.raises(RuntimeError, match="no batch"):
        last_report(module)


def test_no_texts_to_watch() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="fixed_triplets"):
        fixed_triplets(trainer, 2)


def test_a_resumed_run_with_other_texts_has_no_list_of_before_and_after(
    tiny_policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, wider = RationaleTable(str(tmp_path / "a.md"), texts=2), RationaleTable(str(tmp_path / "b.md"), texts=4)
    module = make_module(tiny_policy)
    fit(module, [first], tmp_path)
    assert (tmp_path / "a.md").exists()
    wider.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        fit(make_module(module.policy), [wider], tmp_path)
    assert "the watched texts are not those of before the stop" in caplog.text
    assert len(wider.after) == 4
    assert not (tmp_path / "b.md").exists()
    again = RationaleTable(str(tmp_path / "c.md"), texts=4)  # what it finds is not the start either
    again.load_state_dict(wider.state_dict())
    fit(make_module(module.policy), [again], tmp_path)
    assert not (tmp_path / "c.md").exists()
