"""When checkpoints are saved, which are kept, which is best, and what is left when saving or reading fails."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.monitoring import as_policy_module
from src.callbacks.random_states import RandomStates, random_states, set_random_states
from src.modules.training.finite import NonFiniteError
from src.utils.checkpoint_io import CheckpointError, read_checkpoint
from tests.callbacks.conftest import Interrupt, fit
from tests.small_disk import small_disk


class Metric(L.Callback):
    """Reports scores after some rollout batches, as an evaluation does; counts the checkpoints that exist at once."""

    def __init__(self, scores: dict[int, float], folder: Path) -> None:
        self.scores, self.folder, self.most = scores, folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        batches = as_policy_module(pl_module).rollout_batches
        if batches in self.scores:
            trainer.callback_metrics["mteb/average"] = torch.tensor(self.scores[batches])
            trainer.callback_metrics["mteb/rollout_batches"] = torch.tensor(batches)
        self.most = max(self.most, sum(not path.is_symlink() for path in self.folder.glob("*.ckpt")))


def monitored(folder: Path, scores: dict[int, float], every: int = 1) -> list[L.Callback]:
    return [Metric(scores, folder), RolloutCheckpoint(str(folder), every_n_rollout_batches=every, monitor="mteb/average")]


def about(path: Path) -> tuple[int, float | None]:
    contents = json.loads((path / "checkpoint.json").read_text())
    return contents["rollout_batches"], contents["score"]


def test_best_and_last_are_kept(module, tmp_path):
    folder = tmp_path / "c"
    metric, checkpoint = monitored(folder, {1: 0.2, 2: 0.5, 3: 0.3, 6: 0.4})
    fit(module, [metric, checkpoint], tmp_path, batches=7)
    assert sorted(path.name for path in folder.iterdir()) == ["batch_2.ckpt", "batch_6.ckpt", "batch_7.ckpt", "best.ckpt", "last.ckpt"]
    assert metric.most <= 3
    assert about(folder / "best.ckpt") == (2, pytest.approx(0.5))
    assert about(folder / "last.ckpt") == (7, None)  # these weights have no score
    assert read_checkpoint(folder / "best.ckpt")["grace"]["rollout_batches"] == 2
    assert checkpoint.best_model_score == pytest.approx(0.5)


def test_score_of_earlier_weights_is_not_best(module, tmp_path):
    fit(module, monitored(tmp_path / "c", {1: 0.9, 3: 0.8, 4: 0.1}, every=2), tmp_path, batches=4)
    assert about(tmp_path / "c" / "best.ckpt") == (4, pytest.approx(0.1))


def test_resumed_run_knows_its_best_and_metrics(fresh_module, tmp_path):
    first, branch = tmp_path / "first", tmp_path / "branch"
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(fresh_module(), [*monitored(first, {1: 0.7, 2: 0.1}), Interrupt(at=2)], tmp_path, batches=3)
    trainer = fit(fresh_module(), monitored(first, {}), tmp_path, batches=2, ckpt_path=first / "last.ckpt")  # nothing left to train
    assert float(trainer.callback_metrics["mteb/average"]) == pytest.approx(0.1)
    fit(fresh_module(), monitored(first, {3: 0.4}), tmp_path, batches=3, ckpt_path=first / "last.ckpt")
    assert about(first / "best.ckpt") == (1, pytest.approx(0.7))
    fit(fresh_module(), monitored(branch, {3: 0.4}), tmp_path, batches=3, ckpt_path=first / "batch_1.ckpt")
    assert about(branch / "best.ckpt") == (3, pytest.approx(0.4))


def test_going_back_gives_up_what_came_after(fresh_module, tmp_path):
    folder = tmp_path / "c"

    def run(scores, until, ckpt_path=None):
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(fresh_module(), [*monitored(folder, scores), Interrupt(at=until)], tmp_path, batches=5, ckpt_path=ckpt_path)

    run({1: 0.5, 2: 0.4}, 2)
    run({3: 0.6}, 3, folder / "batch_2.ckpt")
    assert about(folder / "best.ckpt") == (3, pytest.approx(0.6))
    run({3: 0.3, 4: 0.35}, 4, folder / "batch_2.ckpt")
    assert about(folder / "best.ckpt") == (1, pytest.approx(0.5))
    assert about(folder / "last.ckpt") == (4, pytest.approx(0.35))


def test_full_disk_leaves_the_last_checkpoint(fresh_module, tmp_path):
    class Fill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if as_policy_module(pl_module).rollout_batches == 1:
                (disk / "another_file").write_bytes(bytes(shutil.disk_usage(disk).free - 40_000))

    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        checkpoints = disk / "checkpoints"
        with pytest.raises(CheckpointError, match=r"no room to write .*batch_2.ckpt .*ckpt_path=last") as caught:
            fit(fresh_module(), [Fill(), RolloutCheckpoint(str(checkpoints), 1)], tmp_path, batches=4)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in checkpoints.iterdir()) == ["batch_1.ckpt", "last.ckpt"]
        assert read_checkpoint(checkpoints / "last.ckpt")["grace"]["rollout_batches"] == 1
        (disk / "another_file").unlink()
        fit(fresh_module(), [RolloutCheckpoint(str(checkpoints), 1)], tmp_path, batches=4, ckpt_path=checkpoints / "last.ckpt")
        assert about(checkpoints / "last.ckpt") == (4, None)


def test_bad_batch_is_not_saved(module, tmp_path):
    reward = module.reward

    def poisoned(embeddings):
        good = reward(embeddings)
        return replace(good, total=good.total / 0.0) if module.rollout_batches == 2 else good

    module.reward = poisoned
    with pytest.raises(NonFiniteError, match="batch 2, records t0, t1"):
        fit(module, [RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=1)], tmp_path, batches=3)
    last = read_checkpoint(tmp_path / "c" / "last.ckpt")
    assert last["grace"]["rollout_batches"] == 2
    assert all(torch.isfinite(weight).all() for weight in last["state_dict"].values())


def test_random_states_survive_a_checkpoint(tmp_path):
    def draw():
        return [random.random(), float(np.random.rand()), float(np.random.standard_normal()), float(torch.rand(())), random.gauss(0, 1)]

    with torch.random.fork_rng():
        draw()
        torch.save(RandomStates().state_dict(), tmp_path / "states.pt")
        expected = draw()
        loaded = torch.load(tmp_path / "states.pt", weights_only=True)
        callback = RandomStates()
        callback.load_state_dict(loaded)
        draw()
        callback.on_train_batch_start(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), L.LightningModule(), None, 0)
        assert draw() == expected
        set_random_states(loaded["ranks"][0])
        assert draw() == expected
        assert torch.equal(random_states()["torch"], torch.get_rng_state())
