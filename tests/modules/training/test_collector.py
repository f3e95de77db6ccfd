"""What a rollout batch holds, against passes of separate rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from src.modules.objectives.advantages import remax
from src.modules.objectives.rewards import listwise
from src.modules.rollouts.hf import HFEngine
from tests.builders import TRIPLETS, IdsAlone, Inexact, fit, make, off


@pytest.mark.parametrize(
    ("engine", "cap"), [(HFEngine, None), (IdsAlone, None), (Inexact, None), (Inexact, 1.1)], ids=["hf", "ids", "inexact", "corrected"]
)
def test_log_probs_and_embeddings_by_engine(engine: Any, cap: float | None) -> None:
    module = make(engine=engine(6), algorithm={"updates_per_batch": 2, "tis_cap": cap})
    with torch.no_grad():
        batch = module.collector.collect(TRIPLETS, 0)
        part = batch.roles["positive"]
        hidden = module.policy.hidden_states(part.rollouts)
        logprobs, _ = module.policy.logprobs(part.rollouts, hidden)
        pooled = normalize(module.policy.embed(part.rollouts, hidden), dim=-1)
    expected = part.rollouts.logprobs if engine is Inexact and cap is None else logprobs  # the engine's unless they are corrected
    torch.testing.assert_close(part.old_logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.embeddings.positive.flatten(0, 1), pooled, atol=1e-5, rtol=1e-5)


def test_prefixes_of_engine_and_pass_give_one_gradient() -> None:
    runs = [fit(make(listwise, engine=engine(6), algorithm={"gae_lambda": 0.9, "truncation": "none"})) for engine in (HFEngine, IdsAlone)]
    assert off(*(run.gradients[0] for run in runs)) < 1e-4


def test_greedy_baseline_is_the_greedy_rollouts_reward() -> None:
    module = make(algorithm={"advantage": remax, "greedy_baseline": True, "truncation": "none"})
    with torch.no_grad():
        batch = module.collector.collect(TRIPLETS, 0)
        prompts = module.renderer([t.positive for t in TRIPLETS])
        greedy = module.engine.generate(module.policy, prompts, n=1, temperature=0.0, seed=0)
        alone = normalize(module.policy.embed(greedy), dim=-1).unsqueeze(1)
        together = replace(batch.embeddings, positive=torch.cat([batch.embeddings.positive, alone], dim=1))
        own, baseline = module.reward(batch.embeddings).total, module.reward(together).total[:, -1:]
    report = fit(module).reports[0]
    torch.testing.assert_close(report.advantages, own - baseline, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(report.reward.total, own, atol=1e-4, rtol=1e-4)  # untouched by the greedy one
