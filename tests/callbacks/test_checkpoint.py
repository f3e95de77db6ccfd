"""When checkpoints are saved, which are kept, which is best, and what is left when saving or reading goes wrong."""

import json
import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.monitoring import as_grace
from src.callbacks.random_states import RandomStates, random_states, set_random_states
from src.modules.grace import GRACE
from src.modules.policy.model import Policy
from src.utils.checkpoint_io import CheckpointError, read_checkpoint
from tests.callbacks.conftest import Interrupt, fit, make_module
from tests.small_disk import small_disk


class Metric(L.Callback):
    """A score at some rollout batches, as an evaluation leaves it; and how many checkpoints there ever were at once."""

    def __init__(self, scores: dict[int, float], folder: Path) -> None:
        self.scores, self.folder, self.most = scores, folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        batches = as_grace(pl_module).rollout_batches
        if batches in self.scores:
            trainer.callback_metrics["mteb/average"] = torch.tensor(self.scores[batches])
            trainer.callback_metrics["mteb/rollout_batches"] = torch.tensor(batches)
        self.most = max(self.most, sum(not path.is_symlink() for path in self.folder.glob("*.ckpt")))


def about(path: Path) -> tuple[int, float | None]:
    contents = json.loads((path / "checkpoint.json").read_text())
    return contents["rollout_batches"], contents["score"]


def test_best_follows_the_metric_says_how_old_it_is_and_the_folder_stays_small(module: GRACE, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    metric = Metric({1: 0.2, 2: 0.5, 3: 0.3, 6: 0.4}, folder)
    checkpoint = RolloutCheckpoint(str(folder), every_n_rollout_batches=1, monitor="mteb/average")
    fit(module, [metric, checkpoint], tmp_path, batches=7)
    assert sorted(path.name for path in folder.iterdir()) == ["batch_2.ckpt", "batch_6.ckpt", "batch_7.ckpt", "best.ckpt", "last.ckpt"]
    assert metric.most <= 3
    assert about(folder / "best.ckpt") == (2, pytest.approx(0.5))
    assert about(folder / "last.ckpt") == (7, None)  # these weights have no score
    assert read_checkpoint(folder / "best.ckpt")["grace"]["rollout_batches"] == 2
    assert checkpoint.best_model_score == pytest.approx(0.5)


def test_a_score_of_earlier_weights_makes_none_the_best(module: GRACE, tmp_path: Path) -> None:
    checkpoint = RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=2, monitor="mteb/average")
    fit(module, [Metric({1: 0.9, 3: 0.8, 4: 0.1}, tmp_path / "c"), checkpoint], tmp_path, batches=4)
    assert about(tmp_path / "c" / "best.ckpt") == (4, pytest.approx(0.1))


def test_a_resumed_run_knows_its_best_and_a_run_that_branches_off_has_none(tiny_policy_folder: Path, tmp_path: Path) -> None:
    def run(folder: Path, scores: dict[int, float], *more: L.Callback, ckpt_path: Path | None = None) -> None:
        callbacks = [Metric(scores, folder), RolloutCheckpoint(str(folder), every_n_rollout_batches=1, monitor="mteb/average"), *more]
        module = make_module(Policy.load(str(tiny_policy_folder)))
        fit(module, callbacks, tmp_path, batches=3, ckpt_path=None if ckpt_path is None else str(ckpt_path.resolve()))

    first = tmp_path / "first"
    with pytest.raises(RuntimeError, match="interrupted"):
        run(first, {1: 0.7, 2: 0.1}, Interrupt(at=2))
    run(first, {3: 0.4}, ckpt_path=first / "last.ckpt")
    assert about(first / "best.ckpt") == (1, pytest.approx(0.7))
    run(tmp_path / "branch", {3: 0.4}, ckpt_path=first / "batch_2.ckpt")
    assert about(tmp_path / "branch" / "best.ckpt") == (3, pytest.approx(0.4))


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint_intact(tiny_policy_folder: Path, tmp_path: Path) -> None:
    class Fill(L.Callback):
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if as_grace(pl_module).rollout_batches == 1:
                (self.folder / "someone_elses").write_bytes(bytes(shutil.disk_usage(self.folder).free - 40_000))

    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        checkpoints = disk / "checkpoints"
        saving = RolloutCheckpoint(str(checkpoints), every_n_rollout_batches=1)
        with pytest.raises(CheckpointError, match=r"no room to write .*batch_2.ckpt .*Free some and go on with ckpt_path=last") as caught:
            fit(make_module(Policy.load(str(tiny_policy_folder))), [Fill(disk), saving], tmp_path, batches=4)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in checkpoints.iterdir()) == ["batch_1.ckpt", "last.ckpt"]
        assert read_checkpoint(checkpoints / "last.ckpt")["grace"]["rollout_batches"] == 1
        (disk / "someone_elses").unlink()
        again = make_module(Policy.load(str(tiny_policy_folder)))
        more = RolloutCheckpoint(str(checkpoints), every_n_rollout_batches=1)
        fit(again, [more], tmp_path, batches=4, ckpt_path=str((checkpoints / "last.ckpt").resolve()))
        assert about(checkpoints / "last.ckpt") == (4, None)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_goes_on(tiny_policy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fit(make_module(Policy.load(str(tiny_policy_folder))), [RolloutCheckpoint(str(folder), 1)], tmp_path, batches=3)
    weights = folder / "last.ckpt" / "weights.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    again = make_module(Policy.load(str(tiny_policy_folder)))
    offered = rf"batch_3.ckpt cannot be read .* go on with ckpt_path={folder}/batch_2.ckpt$"
    with pytest.raises(CheckpointError, match=offered):
        fit(again, [RolloutCheckpoint(str(folder), 2)], tmp_path, batches=5, ckpt_path=str((folder / "last.ckpt").resolve()))
    fit(again, [RolloutCheckpoint(str(folder), 2)], tmp_path, batches=5, ckpt_path=str(folder / "batch_2.ckpt"))
    assert about(folder / "last.ckpt") == (5, None)
    assert [about(path)[0] for path in sorted(folder.glob("batch_*"))] == [4, 5]


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
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


def test_going_back_to_an_earlier_checkpoint_gives_up_what_came_after_it(tiny_policy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def run(scores: dict[int, float], until: int, ckpt_path: Path | None = None) -> None:
        saving = RolloutCheckpoint(str(folder), every_n_rollout_batches=1, monitor="mteb/average")
        callbacks = [Metric(scores, folder), saving, Interrupt(at=until)]
        module = make_module(Policy.load(str(tiny_policy_folder)))
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(module, callbacks, tmp_path, batches=5, ckpt_path=None if ckpt_path is None else str(ckpt_path))

    run({1: 0.5, 2: 0.4}, 2)
    run({3: 0.6}, 3, folder / "batch_2.ckpt")
    assert about(folder / "best.ckpt") == (3, pytest.approx(0.6))
    run({3: 0.3, 4: 0.35}, 4, folder / "batch_2.ckpt")
    assert about(folder / "best.ckpt") == (1, pytest.approx(0.5))
    assert about(folder / "last.ckpt") == (4, pytest.approx(0.35))
