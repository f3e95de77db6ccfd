"""What an algorithm's settings do to an update of a real policy, and the log-probs' mismatch."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from peft import LoraConfig

from src.modules.encoder.export import load_policy
from src.modules.grace import GRACE
from src.modules.objectives.advantages import rloo
from src.modules.objectives.losses import gspo, importance_weights, ppo_clip, reinforce
from src.modules.objectives.rewards import document
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from tests.builders import TRIPLETS, Inexact, fit, flat, loader, make, off, quiet_trainer, trained, weights
from tests.conftest import ROOT, Compose

ALGORITHMS = sorted(file.stem for file in (ROOT / "configs" / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains(name: str, kl_coef: float, compose: Compose) -> None:
    cfg = compose("~experiment", "name=none", f"algorithm={name}", "rollout.max_new_tokens=6", f"algorithm.kl_coef={kl_coef}")
    module = make()
    module = GRACE(module.policy, module.engine, document, instantiate(cfg.algorithm), "Name the terms.", 100, num_generations=3)
    before = weights(module)
    update = fit(module).reports[0].update
    assert update["updates"] == cfg.algorithm.updates_per_batch
    assert update["groups"] == len(TRIPLETS)
    assert update["grad_norm"] > 0
    assert not torch.equal(before, weights(module))
    assert (module.reference is not None) == (kl_coef > 0) == ("kl_to_reference" in update)
    assert not any("reference" in key for key in module.state_dict())


def test_divergence_in_loss_holds_policy_back() -> None:
    distances = []
    for weight in (0.0, 20.0):
        module = make(algorithm={"kl_coef": weight, "updates_per_batch": 5}, learning_rate=1e-3)
        start, report = weights(module), fit(module, [TRIPLETS] * 3).reports
        distances.append(float((start - weights(module)).norm()))
        if weight:
            assert report[0].update["kl_to_reference"] < report[-1].update["kl_to_reference"]
    assert distances[1] < distances[0]


def test_divergence_in_reward_is_subtracted() -> None:
    module = make(algorithm={"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1", "truncation": "none"})
    with torch.no_grad():  # away from the reference
        for parameter in module.policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        batch = module.collector.collect(TRIPLETS, 0)
        reward, part = module.reward(batch.embeddings).total, batch.roles["positive"]
    assert part.old_logprobs is not None
    assert part.reference_logprobs is not None
    taken = 0.5 * (part.old_logprobs - part.reference_logprobs).sum(dim=1).view_as(reward)
    assert taken.abs().max() > 0.01
    rewards = reward - taken
    advantages = fit(module).reports[0].advantages
    torch.testing.assert_close(advantages, rewards - rewards.mean(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_has_importance_weights(level: str) -> None:
    watch = fit(make(engine=Inexact(6), algorithm={"tis_cap": 1.1, "tis_level": level, "truncation": "none"}))
    start = make(engine=Inexact(6))
    with torch.no_grad():
        rollouts = start.collector.collect(TRIPLETS, 0).roles["positive"].rollouts
    logprobs, _ = start.policy.logprobs(rollouts, start.policy.hidden_states(rollouts))
    mask = rollouts.rationale_mask
    assert rollouts.logprobs is not None
    ratios = importance_weights(logprobs, rollouts.logprobs, mask, 1.1, level=level)  # type: ignore[arg-type]
    assert 0 < (ratios == 1.1).sum() < mask.sum()
    advantages = watch.reports[0].advantages.flatten().unsqueeze(1)
    (-(ratios * advantages * logprobs * mask).sum() / mask.sum()).backward()
    assert off(watch.gradients[0], flat(trained(start.policy))) < 1e-4


def test_exact_engine_needs_no_correction() -> None:
    plain, corrected = (fit(make(algorithm={"tis_cap": cap})).gradients[0] for cap in (None, 2.0))
    assert off(plain, corrected) < 1e-4


@pytest.mark.parametrize("updates", [1, 5])
def test_exact_engine_has_no_mismatch(updates: int) -> None:
    for report in fit(make(algorithm={"updates_per_batch": updates}, learning_rate=1e-2), [TRIPLETS, TRIPLETS]).reports:
        mean, largest = report.logprob_mismatch
        assert 0 <= mean <= largest < 1e-4


@pytest.mark.parametrize("tokens", [10_000, 1])
def test_mismatch_is_over_all_tokens(tokens: int) -> None:
    module = make(engine=Inexact(6), micro_batch_tokens=tokens)
    with torch.no_grad():
        rollouts = module.collector.collect(TRIPLETS, 0).roles["positive"].rollouts
    noise = (0.3 * torch.randn(rollouts.input_ids.shape, generator=torch.Generator().manual_seed(0))).abs()[rollouts.rationale_mask]
    mismatch = fit(module).reports[0].logprob_mismatch
    assert mismatch == pytest.approx((float(noise.mean()), float(noise.max())), abs=1e-4)


def test_policy_stands_still_while_groups_are_gathered() -> None:
    module = make(algorithm={"min_group_std": 1e9, "max_extra_batches": 1})
    before, watch = weights(module), fit(module, [TRIPLETS, TRIPLETS])
    assert [report.update["updates"] for report in watch.reports] == [0.0, 0.0]
    assert torch.equal(before, weights(module))
    deviations = watch.reports[0].reward.total.std(dim=1, correction=0)
    module = make(algorithm={"min_group_std": float(deviations.median()), "max_extra_batches": 2, "truncation": "none"})
    updates = [report.update for report in fit(module, [TRIPLETS] * 3).reports]
    assert updates[0] == {"updates": 0.0, "groups": 0.0}
    gathered = [update["groups"] for update in updates if update["updates"]]
    assert gathered
    assert all(groups >= 1 for groups in gathered)


def test_checkpoint_keeps_adapters_and_held_groups(tiny_policy_folder: Path, tmp_path: Path) -> None:
    def module() -> GRACE:
        policy = Policy.load(str(tiny_policy_folder), pooling="max", lora=LoraConfig(r=4, target_modules="all-linear"))
        algorithm = make(algorithm={"min_group_std": 1e9, "max_extra_batches": 5}).algorithm
        return GRACE(policy, HFEngine(4), document, algorithm, "Name the terms.", 100, num_generations=2, learning_rate=1e-2)

    first, again, trainer = module(), module(), quiet_trainer()
    with torch.no_grad():
        for name, parameter in first.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    trainer.fit(first, loader([TRIPLETS]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert first.buffer.batches == again.buffer.batches == 1
    policy, settings = load_policy(tmp_path / "last.ckpt")
    assert settings.pooling == policy.pooling == "max"
    texts = first.renderer(["some text", "another"])
    pooled = [HFEngine(4).generate(one, texts, n=1, temperature=0.0).embeddings for one in (first.policy, policy)]
    torch.testing.assert_close(*pooled)


def copg(kl_coef: float = 0.1) -> dict[str, object]:
    return {"advantage": rloo, "loss": reinforce, "kl_coef": kl_coef, "kl_estimator": "k1", "kl_in": "pairs", "updates_per_batch": 2}


def test_pairs_are_compared_whole_in_any_micro_batches() -> None:
    group = 100 + 3 * 6
    runs = [fit(make(algorithm=copg(), micro_batch_tokens=size, ends_early=True)).gradients for size in (group, 8192)]
    without = fit(make(algorithm=copg(0.0), ends_early=True)).gradients
    for small, large in zip(*runs, strict=True):
        assert off(small, large) < 1e-4
    assert off(without[1], runs[1][1]) > 1e-4  # from the second update on the policy has left its start
    with pytest.raises(ValueError, match=rf"micro_batch_tokens={group - 1}: .*may take {group} tokens"):
        make(algorithm=copg(), micro_batch_tokens=group - 1)


def test_entropy_coefficient_adds_its_gradient() -> None:
    plain, more, less = (fit(make(algorithm={"entropy_coef": c, "truncation": "none"})).gradients[0] for c in (0.0, 1.0, 2.0))
    assert off(more, plain) > 1e-3
    assert off(less - plain, 2 * (more - plain)) < 1e-3


def test_correction_is_the_engines_by_default() -> None:
    auto, none, three = (make(engine=Inexact(6), algorithm={"tis_cap": cap}) for cap in ("auto", None, 3.0))
    gradients = [fit(module).gradients[0] for module in (auto, none, three)]
    assert torch.equal(gradients[0], gradients[2])
    assert off(gradients[1], gradients[2]) > 1e-3
    assert make(algorithm={"tis_cap": "auto"}).algorithm.tis_cap is None


def test_loss_without_effect_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="src.modules.grace")
    runs = [fit(make(algorithm={"loss": loss, "truncation": "none"})).gradients[0] for loss in (gspo, ppo_clip)]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "src.modules.grace"]
    assert "the loss gspo has the gradient of ppo_clip" in line
    assert off(*runs) < 1e-5
