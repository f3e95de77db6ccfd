"""What an algorithm's numbers do to a training step with a real policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from peft import LoraConfig
from torch import Tensor

from src.modules.encoder.export import load_policy
from src.modules.grace import GRACE
from src.modules.objectives.advantages import remax
from src.modules.objectives.losses import ppo_clip, truncated_importance_weights
from src.modules.objectives.rewards import document
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts
from tests.conftest import ROOT, Compose
from tests.modules.test_grace import TRIPLETS, fit, make, weights

ALGORITHMS = sorted(file.stem for file in (ROOT / "configs" / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_with_and_without_a_reference(name: str, kl_coef: float, compose: Compose) -> None:
    cfg = compose("~experiment", "name=none", f"algorithm={name}", "rollout.max_new_tokens=6", f"algorithm.kl_coef={kl_coef}")
    module = make()
    module = GRACE(module.policy, module.engine, document, instantiate(cfg.algorithm), "Name the terms.", 100, num_generations=3)
    before = weights(module)
    update = fit(module, [TRIPLETS]).reports[0].update
    assert update["updates"] == cfg.algorithm.updates_per_batch
    assert update["groups"] == len(TRIPLETS)
    assert update["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert (module.reference is not None) == (kl_coef > 0) == ("kl_to_reference" in update)
    assert not any("reference" in key for key in module.state_dict())


def test_a_divergence_in_the_loss_holds_the_policy_back() -> None:
    distances = []
    for weight in (0.0, 20.0):
        module = make(algorithm={"kl_coef": weight, "updates_per_batch": 5}, learning_rate=1e-3)
        start = weights(module)
        report = fit(module, [TRIPLETS, TRIPLETS, TRIPLETS]).reports
        distances.append(float(torch.stack([(a - b).square().sum() for a, b in zip(start, weights(module), strict=True)]).sum()))
        if weight:
            assert report[0].update["kl_to_reference"] < report[-1].update["kl_to_reference"]
    assert distances[1] < distances[0]


def test_a_divergence_in_the_reward_is_taken_off_rollout_by_rollout() -> None:
    settings = {"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1", "truncation": "none"}
    module = make(algorithm=settings)
    with torch.no_grad():  # away from the reference
        for parameter in module.policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        scored = module.collector.collect(TRIPLETS, 0)
        reward = module.reward(scored.embeddings).total
    assert scored.roles["positive"].old_logprobs is not None
    assert scored.roles["positive"].reference_logprobs is not None
    taken = 0.5 * (scored.roles["positive"].old_logprobs - scored.roles["positive"].reference_logprobs).sum(dim=1).view_as(reward)
    assert taken.abs().max() > 0.01
    advantages = fit(module, [TRIPLETS]).reports[0].advantages
    rewards = reward - taken
    torch.testing.assert_close(advantages, rewards - rewards.mean(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)


def test_remax_compares_with_the_reward_of_the_greedy_rollout() -> None:
    module = make(algorithm={"advantage": remax, "greedy_baseline": True, "truncation": "none"})
    with torch.no_grad():
        scored = module.collector.collect(TRIPLETS, 0)
        prompts = module.renderer([t.positive for t in TRIPLETS])
        greedy = module.engine.generate(module.policy, prompts, n=1, temperature=0.0, seed=0)
        alone = torch.nn.functional.normalize(module.policy.embed(greedy), dim=-1).unsqueeze(1)
        together = replace(scored.embeddings, positive=torch.cat([scored.embeddings.positive, alone], dim=1))
        own, baseline = module.reward(scored.embeddings).total, module.reward(together).total[:, -1:]
    report = fit(module, [TRIPLETS]).reports[0]
    torch.testing.assert_close(report.advantages, own - baseline, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(report.reward.total, own, atol=1e-4, rtol=1e-4)  # untouched by the greedy one
    assert "greedy" in report.seconds


class Inexact(HFEngine):
    """An engine whose log-probs are not the trainer's, as one of lower precision has them."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = super().generate(*args, **kwargs)
        noise = 0.3 * torch.randn(rollouts.input_ids.shape, generator=torch.Generator().manual_seed(0))
        return replace(rollouts, logprobs=rollouts.logprobs + noise * rollouts.rationale_mask)


@pytest.mark.parametrize("cap", [None, 1.1])
def test_old_log_probs_are_the_trainers_where_the_engine_is_corrected_and_the_engines_where_not(cap: float | None) -> None:
    module = make(algorithm={"updates_per_batch": 2, "tis_cap": cap})
    module.engine = Inexact(6)
    with torch.no_grad():
        scored = module.collector.collect(TRIPLETS, 0)
        own, _ = module.policy.logprobs(scored.roles["positive"].rollouts, module.policy.hidden_states(scored.roles["positive"].rollouts))
    expected = scored.roles["positive"].rollouts.logprobs if cap is None else own
    torch.testing.assert_close(scored.roles["positive"].old_logprobs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_is_weighed_by_truncated_ratios(level: str) -> None:
    module = make(algorithm={"tis_cap": 1.1, "tis_level": level, "truncation": "none"})
    module.engine = Inexact(6)
    watch = fit(module, [TRIPLETS])
    start = make()
    start.engine = Inexact(6)
    with torch.no_grad():
        scored = start.collector.collect(TRIPLETS, 0)
    rollouts, mask = scored.roles["positive"].rollouts, scored.roles["positive"].rollouts.rationale_mask
    logprobs, _ = start.policy.logprobs(rollouts, start.policy.hidden_states(rollouts))
    assert rollouts.logprobs is not None
    ratios = truncated_importance_weights(logprobs, rollouts.logprobs, mask, 1.1, level)  # type: ignore[arg-type]
    assert 0 < (ratios == 1.1).sum() < mask.sum()
    advantages = watch.reports[0].advantages.flatten().unsqueeze(1)
    (-(ratios * advantages * logprobs * mask).sum() / mask.sum()).backward()
    for ours, parameter in zip(watch.gradients[0], start.policy.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-3)


def test_an_exact_engine_needs_no_correction() -> None:
    runs = [fit(make(algorithm={"tis_cap": cap}), [TRIPLETS]) for cap in (None, 2.0)]
    for plain, corrected in zip(*(run.gradients[0] for run in runs), strict=True):
        torch.testing.assert_close(plain, corrected, atol=1e-5, rtol=1e-3)


def test_groups_are_gathered_over_rollout_batches_and_the_policy_stands_still_meanwhile() -> None:
    numbers = {"min_group_std": 1e9, "max_extra_batches": 1}
    module = make(algorithm=numbers)
    before = weights(module)
    watch = fit(module, [TRIPLETS, TRIPLETS])
    assert [report.update["updates"] for report in watch.reports] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    deviations = watch.reports[0].reward.total.std(dim=1, correction=0)
    module = make(algorithm={"min_group_std": float(deviations.median()), "max_extra_batches": 2, "truncation": "none"})
    updates = [report.update for report in fit(module, [TRIPLETS] * 3).reports]
    assert updates[0] == {"updates": 0.0, "groups": 0.0}
    gathered = [update["groups"] for update in updates if update["updates"]]
    assert gathered
    assert all(groups >= 1 for groups in gathered)


def test_a_checkpoint_with_adapters_and_held_groups_comes_back(tiny_policy_folder: Path, tmp_path: Path) -> None:
    import lightning as L
    from torch.utils.data import DataLoader

    def module() -> GRACE:
        policy = Policy.load(str(tiny_policy_folder), pooling="max", lora=LoraConfig(r=4, target_modules="all-linear"))
        fresh = make(algorithm={"min_group_std": 1e9, "max_extra_batches": 5, "loss": ppo_clip})
        return GRACE(policy, HFEngine(4), document, fresh.algorithm, "Name the terms.", 100, num_generations=2, learning_rate=1e-2)

    def trainer(batches: int, **kwargs: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=batches, **quiet, **kwargs)

    first = module()
    with torch.no_grad():
        for name, parameter in first.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    done = trainer(1)
    done.fit(first, DataLoader([TRIPLETS] * 4, batch_size=None))  # type: ignore[arg-type]
    assert first.buffer.batches == 1
    done.save_checkpoint(tmp_path / "last.ckpt")
    again = module()
    again.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert again.buffer.batches == 1
    policy, settings = load_policy(tmp_path / "last.ckpt")
    assert settings.pooling == policy.pooling == "max"
    texts = first.renderer(["some text", "another"])
    pooled: list[Tensor] = []
    for one in (first.policy, policy):
        rollouts = HFEngine(4).generate(one, texts, n=1, temperature=0.0)
        assert rollouts.embeddings is not None
        pooled.append(rollouts.embeddings)
    torch.testing.assert_close(pooled[0], pooled[1])
