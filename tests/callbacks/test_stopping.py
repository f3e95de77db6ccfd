"""A signal between the phases of a batch, and between the tasks of an evaluation; whole runs are in tests/test_resume.py."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.mteb_eval import MTEBEvaluation
from src.evaluation.tasks.offline_tasks import OfflineSize, offline_tasks
from src.modules.grace import GRACE
from src.modules.rollouts.hf import HFEngine
from src.utils.preemption import BeginNextEpoch, StopOnSignal
from tests.callbacks.conftest import fit

SIZE = OfflineSize(documents=60, queries=24, per_module=5, candidates=6, per_label=8)


class Signalled(HFEngine):
    """Is signalled while it writes for the n-th time."""

    def __init__(self, call: int) -> None:
        super().__init__(8)
        self.calls, self.call = 0, call

    def generate(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().generate(*arguments, **options)


def stopping(folder: Path) -> list:
    return [RolloutCheckpoint(str(folder / "c"), 100), StopOnSignal(), BeginNextEpoch()]


def weights_of(module: GRACE) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


def test_stops_before_the_update(fresh_module, tmp_path):
    fit(whole := fresh_module(), [], tmp_path, batches=4)
    stopped = fresh_module()
    stopped.engine = Signalled(call=6)  # two calls a batch: while the third batch's context is written
    with pytest.raises(SIGTERMException):
        fit(stopped, stopping(tmp_path), tmp_path, batches=4)
    assert stopped.rollout_batches == 2
    assert stopped.engine.calls == 6
    resumed = fresh_module()
    fit(resumed, stopping(tmp_path), tmp_path, batches=4, ckpt_path=tmp_path / "c" / "last.ckpt")
    assert resumed.rollout_batches == 4
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


@pytest.mark.timeout(900)
def test_an_evaluation_that_was_stopped_is_done_again(fresh_module, tmp_path):
    def callbacks(module: GRACE, stop_at: int | None = None) -> tuple[list[int], list]:
        tasks, asked = offline_tasks(["networkx", "rich"], tmp_path, SIZE)[3:], []
        evaluation = MTEBEvaluation(lambda: tasks, every_n_rollout_batches=2, rationale=False)
        evaluate = evaluation.evaluate

        def recorded(*arguments):
            asked.append(module.rollout_batches)
            if module.rollout_batches == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments)

        evaluation.evaluate = recorded
        return asked, [evaluation, *stopping(tmp_path)]

    stopped, resumed = fresh_module(), fresh_module()
    asked, own = callbacks(stopped, stop_at=2)
    with pytest.raises(SIGTERMException):
        fit(stopped, own, tmp_path, batches=3)
    assert (asked, own[0]._scored_at) == ([0, 2], 0)
    asked, again = callbacks(resumed)
    trainer = fit(resumed, again, tmp_path, batches=3, ckpt_path=tmp_path / "c" / "last.ckpt")
    assert asked == [2, 3]
    assert trainer.callback_metrics["mteb/rollout_batches"] == 3
