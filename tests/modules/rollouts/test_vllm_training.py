"""GRACE trained through vLLM and through the in-process engine."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from src.callbacks.checkpoint import RolloutCheckpoint
from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo, remax
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import listwise
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts import vllm_engine
from src.modules.rollouts.hf import HFEngine
from src.modules.rollouts.vllm_engine import EngineError
from src.modules.types import Rollouts
from tests.builders import SENTENCES, TRIPLETS, fit
from tests.callbacks.conftest import fit as fit_few
from tests.conftest import ROOT, Compose
from tests.vllm_builders import NEEDS_VLLM, engine, policy_of
from train import train

pytestmark = NEEDS_VLLM


class SamePositives:
    """Positives always from HFEngine, as no two engines draw alike; greedy queries and negatives from another engine."""

    exact = True

    def __init__(self, others: Any) -> None:
        self.max_new_tokens, self.others = others.max_new_tokens, others

    def generate(self, policy: Policy, prompts: Prompts, n: int, temperature: float, seed: int, prefixes: bool = False) -> Rollouts:
        chosen = HFEngine(self.max_new_tokens) if temperature > 0 else self.others
        return chosen.generate(policy, prompts, n, temperature, seed, prefixes)


def grace(rollouts: Any, **settings: Any) -> GRACE:
    return GRACE(
        policy_of(),
        rollouts,
        listwise,
        Algorithm(**{"advantage": grpo, "loss": ppo_clip, **settings}),
        instruction="Name the terms.",
        max_prompt_tokens=100,
        num_generations=4,
        context_temperature=0.0,
        learning_rate=1e-3,
    )


def test_five_steps_through_either_engine() -> None:
    runs = [grace(SamePositives(HFEngine(12))), grace(SamePositives(engine(12)))]
    start = runs[0].encoder().explain(SENTENCES)
    reports = [fit(run, [TRIPLETS] * 5).reports for run in runs]
    for ours, theirs in zip(*reports, strict=True):
        # embeddings met while sampling in the one, from an encode pass in the other
        torch.testing.assert_close(ours.reward.total, theirs.reward.total, atol=1e-4, rtol=0)
    for run, own in zip(runs, (HFEngine(12), engine(12)), strict=True):
        run.engine = own
    (embeddings, rationales), (theirs_embedded, theirs_written) = (run.encoder().explain(SENTENCES) for run in runs)
    assert rationales == theirs_written
    np.testing.assert_allclose(embeddings, theirs_embedded, atol=1e-3, rtol=0)
    assert np.abs(embeddings - start[0]).max() > 1e-2  # the updates did something


def test_importance_weights_correct_a_bfloat16_engine() -> None:
    runs = [grace(engine(dtype="bfloat16"), tis_cap=cap) for cap in (None, 2.0)]
    watches = [fit(run) for run in runs]
    assert all(watch.reports[0].logprob_mismatch[0] > 1e-4 for watch in watches)
    norms = [watch.reports[0].update["grad_norm"] for watch in watches]
    assert norms[0] != norms[1]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)  # ratios within a few hundredths of 1


@pytest.mark.parametrize("updates", [1, 3])
def test_mismatch_is_rounding_and_engine_is_not_saved(updates: int) -> None:
    module = grace(engine(12), updates_per_batch=updates)
    names = set(grace(HFEngine(12)).state_dict())
    for report in fit(module, [TRIPLETS] * 3).reports:
        mean, largest = report.logprob_mismatch
        assert 0 < mean <= largest < 1e-4
        assert report.update["updates"] == updates
    assert set(module.state_dict()) == names


def test_stale_copy_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = grace(engine(12))
    fit(module)
    monkeypatch.setattr("src.modules.rollouts.vllm_engine.push", lambda llm, model: None)
    with pytest.raises(EngineError, match=r"^vLLM does not sample from the policy's weights"):
        fit(module)


def test_one_push_and_one_call_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = grace(engine(12), greedy_baseline=True, advantage=remax)
    llm = module.engine.started(module.policy).llm
    pushes, calls = [], []
    push, generate = vllm_engine.push, llm.generate
    monkeypatch.setattr(vllm_engine, "push", lambda *args: pushes.append(1) or push(*args))
    monkeypatch.setattr(llm, "generate", lambda prompts, *args, **kwargs: calls.append(len(prompts)) or generate(prompts, *args, **kwargs))
    fit(module, [TRIPLETS] * 2)
    assert len(pushes) == 2
    b = len(TRIPLETS)
    assert calls == [1, 4 * b] * 2  # the known text; positives, queries and negatives, greedy positives


def test_run_resumes_after_the_engine_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    class DyingInTheSecondBatch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            llm = pl_module.engine.started(pl_module.policy).llm
            monkeypatch.setattr(llm.llm_engine, "step", die)

    def die() -> None:
        raise EngineDeadError()

    def checkpoint() -> RolloutCheckpoint:
        return RolloutCheckpoint(str(tmp_path), every_n_rollout_batches=1)

    with pytest.raises(EngineError, match=r"^vLLM died .*ckpt_path="):
        fit_few(grace(engine(12)), [checkpoint(), DyingInTheSecondBatch()], tmp_path, batches=2)
    resumed = grace(engine(12))
    fit_few(resumed, [checkpoint()], tmp_path, batches=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.rollout_batches == 2


def test_command_line_trains_with_vllm(compose: Compose) -> None:
    small = ["rollout.max_new_tokens=16", "rollout.sleep=false", "rollout.gpu_memory_utilization=0.05", "rollout.cpu_kv_cache_gib=0.2"]
    run = ["logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=2"]
    # truncated rationales are masked out by default, and in 16 tokens few finish
    cfg = compose("rollout=vllm", "algorithm.truncation=relative", *small, *run)
    cfg.policy.path = str(ROOT / "experiments" / "tiny_policy" / "weights")
    cfg.packages.train = ["urllib3"]
    cfg.optimized_metric = "rollout/logprob_mismatch_max"
    mismatch = train(cfg)
    assert mismatch is not None
    assert 0 < mismatch < 1e-3
