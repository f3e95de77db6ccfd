import functools
import gc
import math
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import document, listwise, paper
from src.modules.rollouts.hf import HFEngine
from src.modules.training.finite import NonFiniteError
from src.modules.training.metrics import unrelated_similarity
from src.modules.training.update import Updater
from src.modules.types import Embeddings, Reward, Rollouts
from src.records import Triplet
from src.utils.timing import OutOfMemoryError
from tests.builders import SENTENCES, small_policy

TRIPLETS = [
    Triplet(f"file.jsonl:{i}", SENTENCES[i][:20], SENTENCES[i], (SENTENCES[(i + 1) % len(SENTENCES)][::-1],)) for i in range(len(SENTENCES))
]


def make(reward: Any = document, encoder: str = "live", algorithm: dict[str, Any] | None = None, **kwargs: Any) -> GRACE:
    settings: dict[str, Any] = {"num_generations": 3, "learning_rate": 1e-3, "max_prompt_tokens": 100, "max_grad_norm": 1e9, **kwargs}
    new_tokens = settings.pop("max_new_tokens", 6)
    return GRACE(
        policy=small_policy(encoder),
        engine=HFEngine(new_tokens),
        reward=reward,
        algorithm=Algorithm(**{"advantage": grpo, "loss": ppo_clip, **(algorithm or {})}),
        instruction="Name the terms.",
        **settings,
    )


class Watch(L.Callback):
    """Keeps the gradients that the optimiser sees and the report of every batch."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.reports: list[Any] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.reports.append(pl_module.batch_metrics)


def fit(module: GRACE, batches: list[list[Triplet]], precision: Any = "32-true") -> Watch:
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return watch


def weights(module: GRACE) -> list[Tensor]:
    return [p.detach().clone() for p in module.policy.model.parameters()]


@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_does_not_depend_on_the_micro_batch(updates):
    runs = [fit(make(micro_batch_tokens=size, algorithm={"updates_per_batch": updates}), [TRIPLETS]) for size in (10_000, 1, 64, 150)]
    for run in runs[1:]:
        assert len(run.gradients) == updates
        for ours, unsplit in zip(run.gradients[0], runs[0].gradients[0], strict=True):
            torch.testing.assert_close(ours, unsplit, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("truncation", ["relative", "mask"])
def test_the_gradient_is_that_of_advantage_weighted_log_probabilities_from_transformers_itself(truncation):
    settings = {"algorithm": {"truncation": truncation}, "max_new_tokens": 30, "seed": 9}
    watch = fit(make(**settings), [TRIPLETS])
    start = make(**settings)  # the same weights, seed and rollouts
    scored = start.collector.collect(TRIPLETS, 0)
    advantages = watch.reports[0].advantages.flatten()
    rollouts = scored.roles["positive"].rollouts
    kept = rollouts.finished | (truncation != "mask")
    assert kept.any()
    assert kept.all() == (truncation != "mask")
    logits = start.policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    mask = rollouts.rationale_mask[:, 1:] & kept.unsqueeze(1)
    (-(advantages.unsqueeze(1) * logprobs * mask).sum() / mask.sum()).backward()
    expected = [p.grad for p in start.policy.model.parameters()]
    for ours, theirs in zip(watch.gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


class WithoutStates(HFEngine):
    """An engine that returns token ids alone, as one with its own copy of the weights does."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        return replace(super().generate(*args, **kwargs), logprobs=None, embeddings=None)


@pytest.mark.parametrize("engine", [HFEngine(6), WithoutStates(6)])
def test_log_probs_and_embeddings_are_those_of_separate_rows_whether_the_engine_gives_them_or_a_pass(engine):
    module = make(algorithm={"updates_per_batch": 2})
    module.engine = engine
    with torch.no_grad():
        scored = module.collector.collect(TRIPLETS, 0)
        hidden = module.policy.hidden_states(scored.roles["positive"].rollouts)
        logprobs, _ = module.policy.logprobs(scored.roles["positive"].rollouts, hidden)
        pooled = torch.nn.functional.normalize(module.policy.embed(scored.roles["positive"].rollouts, hidden), dim=-1)
    assert scored.roles["positive"].old_logprobs is not None
    torch.testing.assert_close(scored.roles["positive"].old_logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.embeddings.positive.flatten(0, 1), pooled, atol=1e-5, rtol=1e-5)


def test_rollouts_that_are_left_out_of_the_loss_are_not_computed(monkeypatch):
    module = make(algorithm={"truncation": "mask"}, max_new_tokens=30, seed=9)
    monkeypatch.setattr("src.modules.grace.require_readable", lambda policy: None)  # which has passes of its own
    seen = []
    forward = module.policy.forward
    monkeypatch.setattr(module.policy, "forward", lambda part, *how, **asked: seen.append(part.finished) or forward(part, *how, **asked))
    report = fit(module, [TRIPLETS]).reports[0]
    assert torch.cat(seen).all()
    assert len(torch.cat(seen)) == int(report.finished.sum()) < report.finished.numel()


def test_several_updates_see_the_sampling_policys_ratio_move_away_from_one():
    watch = fit(make(algorithm={"updates_per_batch": 5}, learning_rate=1e-2), [TRIPLETS])
    update = watch.reports[0].update
    assert update["updates"] == 5
    assert update["approx_kl"] > 1e-4
    assert fit(make(learning_rate=1e-2), [TRIPLETS]).reports[0].update["approx_kl"] == 0


def test_a_run_repeats_itself_under_its_seed_and_differs_under_another():
    totals = [fit(make(seed=seed), [TRIPLETS, TRIPLETS]).reports[1].reward.total for seed in (0, 0, 1)]
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


def test_the_report_counts_what_happened():
    module = make()
    report = fit(module, [TRIPLETS, TRIPLETS]).reports[1]
    assert module.rollout_batches == 2
    assert report.advantages.shape == report.finished.shape == report.rationale_lengths.shape == (5, 3)
    assert report.instance_ids == [t.id for t in TRIPLETS]
    assert set(report.seconds) == {"rollout", "encode", "update"}
    assert 0 < report.distinct_rationales <= 1
    assert report.rollout_tokens >= report.rationale_lengths.sum()
    assert report.update["grad_norm"] > 0
    assert report.update["entropy"] > 0


def test_a_frozen_encoder_embeds_alike_before_and_after_an_update_and_a_live_one_does_not():
    for encoder, same in (("frozen", True), ("live", False)):
        module = make(encoder=encoder, learning_rate=1e-2)
        rollouts = module.engine.generate(module.policy, module.renderer(["some text"]), 1, 0.0, 0)
        with torch.no_grad():
            before = module.policy.embed(rollouts)
            fit(module, [TRIPLETS])
            after = module.policy.embed(rollouts)
        assert torch.equal(before, after) is same


@pytest.mark.parametrize("penalty", ["relative", "constant", "mask"])
def test_a_batch_in_which_every_rollout_is_truncated_goes_through(penalty):
    module = make(algorithm={"truncation": penalty}, max_new_tokens=1, num_generations=4, seed=2)  # under this seed no first token is EOS
    before = weights(module)
    report = fit(module, [TRIPLETS]).reports[0]
    assert not report.finished.any()
    moved = any(not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    # a constant penalty makes all rewards equal and a mask leaves nothing: only `relative` has something to learn from
    assert moved == (penalty == "relative")
    assert report.update["updates"] == (0 if penalty == "mask" else 1)


def test_one_instance_a_batch_trains_without_in_batch_negatives_and_listwise_says_it_cannot():
    assert torch.isfinite(fit(make(paper), [TRIPLETS[:1]]).reports[0].reward.total).all()
    assert math.isnan(unrelated_similarity(torch.randn(1, 3, 8)))
    with pytest.raises(ValueError, match="at least 2 instances"):
        fit(make(listwise), [TRIPLETS[:1]])


@pytest.mark.parametrize("reward", [paper, document, listwise])
def test_instances_without_negatives_train(reward):
    bare = [replace(triplet, negatives=()) for triplet in TRIPLETS]
    assert torch.isfinite(fit(make(reward), [bare]).reports[0].reward.total).all()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"temperature": 0.0}, "temperature=0.0"),  # log-probs would be divided by it
        ({"context_temperature": -0.5}, "context_temperature=-0.5"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens=0"),
        ({"encode_batch_size": 0}, "encode_batch_size=0"),
        ({"algorithm": {"updates_per_batch": 0}}, "updates_per_batch=0"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        make(**settings)


def test_more_updates_than_instances_leave_the_empty_ones_out():
    assert fit(make(algorithm={"updates_per_batch": 4}), [TRIPLETS[:2]]).reports[0].update["updates"] == 2


def test_records_with_different_numbers_of_negatives_are_named():
    odd = Triplet("file.jsonl:9", "a query", "a document", ())
    with pytest.raises(ValueError, match="one number of negatives"):
        fit(make(), [[*TRIPLETS, odd]])


def broken_reward(e: Embeddings, value: float) -> Reward:
    good = document(e)
    total = good.total.clone()
    total[1, 2] = value
    return Reward({**good.terms, "mine": total}, {**good.weights, "mine": 1.0}, total)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_with_step_term_and_record(value):
    module = make(functools.partial(broken_reward, value=value))
    before = weights(module)
    with pytest.raises(NonFiniteError, match=r"'mine' is not finite in rollout batch 0, records file\.jsonl:1;"):
        fit(module, [TRIPLETS])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    def explode(*args: Tensor) -> Any:
        result = ppo_clip(*args)
        flat = (result.loss * 0.0).sqrt()  # 0, and its derivative is not a number
        return type(result)(result.loss + flat, result.clipped, result.kl)

    module = make(algorithm={"loss": explode})
    before = weights(module)
    with pytest.raises(NonFiniteError, match=r"gradient norm is nan in rollout batch 0, records file\.jsonl:0, file"):
        fit(module, [TRIPLETS])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


class BrokenLogprobs(HFEngine):
    """An engine that returns log-probs that are not numbers for the rationales of one record."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = super().generate(*args, **kwargs)
        if kwargs["n"] == 1:
            return rollouts
        logprobs = rollouts.logprobs.clone()
        logprobs[2 * kwargs["n"] : 3 * kwargs["n"]] = torch.nan
        return replace(rollouts, logprobs=logprobs)


def test_a_micro_batch_whose_loss_is_not_a_number_stops_before_the_weights_change_and_its_record_is_named():
    module = make(algorithm={"tis_cap": 3.0}, micro_batch_tokens=1)
    module.engine = BrokenLogprobs(6)
    before = weights(module)
    with pytest.raises(NonFiniteError, match=r"the loss of a micro-batch is nan, records file\.jsonl:2; the weights were not changed"):
        fit(module, [TRIPLETS])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def test_memory_that_runs_out_in_an_update_is_one_line_with_the_setting_to_lower():
    def greedy_for_memory(*args: Tensor) -> Any:
        return ppo_clip(*args), torch.empty(1 << 58, dtype=torch.uint8)  # a real allocation, and more than any machine has

    with pytest.raises(OutOfMemoryError, match=r"^out of memory in the update phase .*: lower module.micro_batch_tokens, .*$") as caught:
        fit(make(algorithm={"loss": greedy_for_memory}), [TRIPLETS])
    assert "\n" not in str(caught.value)


def test_unrelated_similarity_is_the_mean_over_pairs_of_different_instances():
    positive = torch.nn.functional.normalize(torch.randn(3, 2, 5, dtype=torch.float64), dim=-1)
    pairs = [positive[i, k] @ positive[j, r] for i in range(3) for j in range(3) if i != j for k in range(2) for r in range(2)]
    assert abs(unrelated_similarity(positive) - float(torch.stack(pairs).mean())) < 1e-9


def test_credit_by_token_sees_the_same_rollouts_and_judges_them_otherwise():
    plain = fit(make(algorithm={"updates_per_batch": 1, "truncation": "none"}), [TRIPLETS[:4]])
    by_token = make(algorithm={"updates_per_batch": 1, "truncation": "none", "gae_lambda": 1.0})
    watch = fit(by_token, [TRIPLETS[:4]])
    torch.testing.assert_close(watch.reports[0].reward.total, plain.reports[0].reward.total)
    assert not torch.allclose(watch.reports[0].advantages, plain.reports[0].advantages)
    assert torch.isfinite(watch.reports[0].advantages).all()


@pytest.mark.parametrize("encoder", ["live", "frozen"])
@pytest.mark.parametrize("updates", [1, 2])
def test_credit_by_token_trains_with_prefixes_from_the_engine_or_from_a_pass(encoder, updates):
    module = make(listwise, encoder, algorithm={"updates_per_batch": updates, "gae_lambda": 0.9})
    before = weights(module)
    watch = fit(module, [TRIPLETS[:4], TRIPLETS[-4:]])
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert all(math.isfinite(report.update["loss"]) for report in watch.reports)


def test_prefixes_from_the_engine_and_from_a_pass_give_the_same_gradient():
    def run(drop: bool) -> list[Tensor]:
        module = make(listwise, algorithm={"gae_lambda": 0.9, "truncation": "none"})
        if drop:
            generate = module.engine.generate
            module.engine.generate = lambda *args, **kwargs: replace(generate(*args, **kwargs), embeddings=None, prefix_embeddings=None)
        return fit(module, [TRIPLETS[:4]]).gradients[0]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("gae_lambda", [None, 0.9])
@pytest.mark.parametrize("form", [paper, document, listwise])
def test_in_bfloat16_arithmetic_rewards_are_those_of_float32(form: Any, gae_lambda: float | None) -> None:
    """Products of unit vectors in bfloat16 would leave a group's rollouts two or three different rewards."""
    earned: list[tuple[Embeddings, Tensor]] = []

    def watched(e: Embeddings) -> Reward:
        reward = form(e)
        earned.append((e, reward.total))
        return reward

    module = make(watched, algorithm={"gae_lambda": gae_lambda})
    report = fit(module, [TRIPLETS], precision="bf16-mixed").reports[0]
    assert (len(earned) > 2) if gae_lambda else (len(earned) == 1)  # once for all that it serves
    for e, total in earned:
        assert e.positive.dtype == total.dtype == torch.float32
        torch.testing.assert_close(total, form(e).total, atol=1e-6, rtol=1e-6)
    means = earned[0][0].positive.mean(dim=1)
    unrelated = (means @ means.T)[~torch.eye(len(means), dtype=torch.bool)].mean()
    assert report.unrelated_similarity == pytest.approx(float(unrelated), abs=1e-6)
    assert report.advantages.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_arithmetic_that_trains_wrongly_is_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer.precision={precision}: use bf16-mixed or 32-true"):
        fit(make(), [TRIPLETS], precision=precision)


def test_no_other_sides_may_be_written_as_null() -> None:
    assert make(also_learn_from=None).hparams["also_learn_from"] == ()


def test_tokens_are_those_of_what_was_updated_on() -> None:
    module = make(algorithm={"min_group_std": 1e-9, "max_extra_batches": 1, "updates_per_batch": 1})
    both, alone = fit(module, [TRIPLETS[:3]]).reports[0], fit(make(), [TRIPLETS[:3]]).reports[0]
    assert both.update_tokens == alone.update_tokens > 0
    gathering = make(algorithm={"min_group_std": 1e9, "max_extra_batches": 1})
    assert [report.update_tokens for report in fit(gathering, [TRIPLETS[:3]] * 2).reports] == [0, 0]


def test_prefix_embeddings_are_released_before_the_update(monkeypatch):
    held, update = [], Updater.update

    def watched(self: Updater, *args: Any) -> dict[str, float]:
        held.extend(x.shape for x in gc.get_objects() if type(x) is Tensor and x.dim() == 4 and x.shape[-1] == 32)
        return update(self, *args)

    monkeypatch.setattr(Updater, "update", watched)
    module = make(algorithm={"gae_lambda": 0.9})
    fit(module, [TRIPLETS])
    assert held == []
    positive = module.collector.collect(TRIPLETS, 0).roles["positive"]
    assert positive.prefixes is not None
    assert positive.rollouts.embeddings is None
    assert positive.rollouts.prefix_embeddings is None


class Novelty(torch.nn.Module):
    """Minus the similarity to the previous batch's queries: a reward term that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("previous", torch.zeros(0, 32))
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, e: Embeddings) -> Reward:
        base = document(e)
        novelty = -self.weight * torch.einsum("ikd,jd->ikj", e.positive, self.previous).sum(dim=2)
        return Reward({**base.terms, "novelty": novelty}, {**base.weights, "novelty": 1.0}, base.total + novelty)

    def remember(self, e: Embeddings) -> None:
        self.previous = e.query


def test_a_reward_that_remembers_is_told_once_a_batch_and_kept_in_checkpoints() -> None:
    def made() -> GRACE:
        return make(Novelty(), pathwise_reward=Novelty(), pathwise_weight=0.5)

    module, again = made(), made()
    reports = fit(module, [TRIPLETS, TRIPLETS]).reports
    assert reports[0].reward.terms["novelty"].eq(0).all()
    assert reports[1].reward.terms["novelty"].abs().max() > 0
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "optimizer_states": []}
    module.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    for ours, theirs in (
        (again.reward_function, module.reward_function),
        (again.pathwise_reward_function, module.pathwise_reward_function),
    ):
        assert ours.previous.shape == (len(TRIPLETS), 32)  # of a size that a new module cannot know
        assert torch.equal(ours.previous, theirs.previous)
        assert not ours.weight.requires_grad
