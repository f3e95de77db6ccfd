"""The module's training step in real fits of the small policy. Its parts are tested in training/ and objectives/."""

import functools
import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from src.modules.grace import GRACE
from src.modules.objectives.advantages import remax
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import document, listwise, paper, unsupervised
from src.modules.rollouts.hf import HFEngine
from src.modules.training.finite import NonFiniteError
from src.modules.training.metrics import unrelated_similarity
from src.modules.training.update import Updater
from src.modules.types import Embeddings, Reward, Rollouts
from src.records import Triplet
from src.utils.timing import OutOfMemoryError
from tests.builders import TRIPLETS, fit, make, off, weights
from tests.oracles import step_gradients

SHORT, LONG = {"max_new_tokens": 1, "num_generations": 4, "seed": 2}, {"max_new_tokens": 30, "seed": 9}
"""Under these seeds no rationale is finished, and some are."""
ALL_ROLES = {"also_learn_from": ["query", "negative"]}


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"algorithm": {"truncation": "relative"}, **LONG}, 1),
        ({"algorithm": {"truncation": "mask"}, "max_new_tokens": 3, "ends_early": True}, 1),
        ({"reward": listwise, "also_learn_from": ["query"], "algorithm": {"truncation": "none"}}, 2),
        ({"reward": listwise, **ALL_ROLES, "algorithm": {"truncation": "none"}}, 3),
    ],
)
def test_step_gradient_is_transformers(settings: dict[str, Any], groups: int) -> None:
    expected, _ = step_gradients(make(**settings), TRIPLETS)
    for tokens in (10_000, 150, 1):
        seen = fit(make(**settings, micro_batch_tokens=tokens))
        assert len(seen.gradients) == 1
        assert off(seen.gradients[0], expected) < 1e-4
    report = seen.reports[0]
    assert report.update["groups"] == groups * len(TRIPLETS)
    others = {role: (len(TRIPLETS), 3) for role in settings.get("also_learn_from", ())}
    assert {role: values.shape for role, values in report.other_rewards.items()} == others


def test_micro_batches_keep_first_of_two_updates() -> None:
    runs = [fit(make(micro_batch_tokens=size, algorithm={"updates_per_batch": 2})).gradients for size in (10_000, 64, 1)]
    for run in runs:
        assert len(run) == 2
        assert off(run[0], runs[0][0]) < 1e-4


def test_masked_rollouts_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(algorithm={"truncation": "mask"}, **LONG)
    monkeypatch.setattr("src.modules.grace.require_readable", lambda *_: None)  # which has passes of its own
    seen: list[Tensor] = []
    forward = module.policy.forward
    monkeypatch.setattr(module.policy, "forward", lambda part, *a, **b: seen.append(part.finished) or forward(part, *a, **b))
    report = fit(module).reports[0]
    assert torch.cat(seen).all()
    assert len(torch.cat(seen)) == int(report.finished.sum()) < report.finished.numel()


@pytest.mark.parametrize("penalty", ["relative", "constant", "mask"])
def test_batch_of_truncated_rollouts_trains(penalty: str) -> None:
    module = make(algorithm={"truncation": penalty}, **SHORT)
    before, report = weights(module), fit(module).reports[0]
    assert not report.finished.any()
    # a constant penalty makes all rewards equal and a mask leaves nothing: only `relative` has something to learn from
    assert torch.equal(before, weights(module)) == (penalty != "relative")
    assert report.update["updates"] == (0 if penalty == "mask" else 1)
    assert math.isnan(report.logprob_mismatch[0]) == (penalty == "mask")


def test_ratio_moves_over_several_updates() -> None:
    update = fit(make(algorithm={"updates_per_batch": 5}, learning_rate=1e-2)).reports[0].update
    assert update["updates"] == 5
    assert update["approx_kl"] > 1e-4
    assert fit(make(learning_rate=1e-2)).reports[0].update["approx_kl"] == 0
    assert fit(make(algorithm={"updates_per_batch": 4}), [TRIPLETS[:2]]).reports[0].update["updates"] == 2  # no empty ones


def test_seed_decides_the_run() -> None:
    totals = [fit(make(seed=seed), [TRIPLETS, TRIPLETS]).reports[1].reward.total for seed in (0, 0, 1)]
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


def test_report_counts() -> None:
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


def test_update_tokens_count_gathered_groups() -> None:
    module = make(algorithm={"min_group_std": 1e-9, "max_extra_batches": 1, "updates_per_batch": 1})
    both, alone = fit(module, [TRIPLETS[:3]]).reports[0], fit(make(), [TRIPLETS[:3]]).reports[0]
    assert both.update_tokens == alone.update_tokens > 0
    gathering = make(algorithm={"min_group_std": 1e9, "max_extra_batches": 1})
    assert [report.update_tokens for report in fit(gathering, [TRIPLETS[:3]] * 2).reports] == [0, 0]


@pytest.mark.parametrize("reward", [paper, document, listwise])
def test_no_negatives_or_one_instance(reward: Any) -> None:
    bare = [replace(triplet, negatives=()) for triplet in TRIPLETS]
    assert torch.isfinite(fit(make(reward), [bare]).reports[0].reward.total).all()
    if reward is listwise:
        with pytest.raises(ValueError, match="at least 2 instances"):
            fit(make(reward), [TRIPLETS[:1]])
    else:
        assert torch.isfinite(fit(make(reward), [TRIPLETS[:1]]).reports[0].reward.total).all()


@pytest.mark.parametrize(
    ("encoder", "algorithm"),
    [
        ("live", {"gae_lambda": 0.9, "updates_per_batch": 2}),
        ("frozen", {"gae_lambda": 0.9, "updates_per_batch": 2}),
        ("live", {"greedy_baseline": True, "advantage": remax}),
        ("live", {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"}),
        ("live", {"min_group_std": 1e9, "max_extra_batches": 1}),
    ],
)
def test_all_roles_with_every_algorithm(encoder: str, algorithm: dict[str, Any]) -> None:
    module = make(listwise, encoder, **ALL_ROLES, algorithm=algorithm)
    before, reports = weights(module), fit(module, [TRIPLETS[:4], TRIPLETS[-4:]]).reports
    moved = not torch.equal(before, weights(module))
    assert moved == ("min_group_std" not in algorithm)  # a spread that no group has: nothing to learn from
    assert all(report.update["groups"] == (12.0 if moved else 0.0) for report in reports)
    assert not moved or all(math.isfinite(report.update["loss"]) for report in reports)


def test_gradients_are_scaled_down_to_their_largest_norm() -> None:
    free = fit(make(max_grad_norm=1e9))
    norm = float(free.gradients[0].norm())
    held, enough = (fit(make(max_grad_norm=share * norm)) for share in (0.5, 1.1))
    assert free.reports[0].update["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert held.reports[0].update["grad_norm"] == pytest.approx(norm, rel=1e-5)  # that of before
    torch.testing.assert_close(held.gradients[0], 0.5 * free.gradients[0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(enough.gradients[0], free.gradients[0], rtol=0, atol=0)


def test_token_credit_changes_advantages_alone() -> None:
    plain, by_token = (fit(make(algorithm={"truncation": "none", "gae_lambda": value})).reports[0] for value in (None, 1.0))
    torch.testing.assert_close(by_token.reward.total, plain.reward.total)
    assert not torch.allclose(by_token.advantages, plain.advantages)
    assert torch.isfinite(by_token.advantages).all()


@pytest.mark.parametrize("gae_lambda", [None, 0.9])
@pytest.mark.parametrize("form", [paper, document, listwise])
def test_rewards_are_float32_under_bfloat16(form: Any, gae_lambda: float | None) -> None:
    """Products of unit vectors in bfloat16 would leave a group's rollouts two or three different rewards."""
    seen: list[tuple[Embeddings, Tensor]] = []

    def watched(e: Embeddings) -> Reward:
        reward = form(e)
        seen.append((e, reward.total))
        return reward

    report = fit(make(watched, algorithm={"gae_lambda": gae_lambda}), precision="bf16-mixed").reports[0]
    assert (len(seen) > 2) if gae_lambda else (len(seen) == 1)  # once for all that it serves
    for e, total in seen:
        assert e.positive.dtype == total.dtype == torch.float32
        torch.testing.assert_close(total, form(e).total, atol=1e-6, rtol=1e-6)
    positive = seen[0][0].positive
    pairs = [positive[i, k] @ positive[j, r] for i in range(5) for j in range(5) if i != j for k in range(3) for r in range(3)]
    assert report.unrelated_similarity == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert math.isnan(unrelated_similarity(positive[:1]))
    assert report.advantages.dtype == torch.float32


class WithAParameter(torch.nn.Module):
    """A reward that remembers, and has a weight that could be trained."""

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
        return make(WithAParameter(), pathwise_reward=WithAParameter(), pathwise_weight=0.5)

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


# ---- bad input


def broken_reward(e: Embeddings, value: float) -> Reward:
    good = document(e)
    total = good.total.clone()
    total[1, 2] = value
    return Reward({**good.terms, "mine": total}, {**good.weights, "mine": 1.0}, total)


def explode(*args: Tensor) -> Any:
    result = ppo_clip(*args)
    return replace(result, loss=result.loss + (result.loss * 0.0).sqrt())  # 0, and its derivative is not a number


class BrokenLogprobs(HFEngine):
    """Log-probs of one record are not numbers."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = super().generate(*args, **kwargs)
        if kwargs["n"] > 1:
            rollouts.logprobs[2 * kwargs["n"] : 3 * kwargs["n"]] = torch.nan
        return rollouts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": functools.partial(broken_reward, value=math.nan)}, r"'mine' is not finite in rollout batch 0, records file\.jsonl:1;"),
        ({"reward": functools.partial(broken_reward, value=math.inf)}, r"'mine' is not finite in rollout batch 0, records file\.jsonl:1;"),
        ({"algorithm": {"loss": explode}}, r"gradient norm is nan in rollout batch 0, records file\.jsonl:0, file"),
        (
            {"engine": BrokenLogprobs(6), "algorithm": {"tis_cap": 3.0}, "micro_batch_tokens": 1},
            r"the loss of a micro-batch is nan, records file\.jsonl:2; the weights were not changed",
        ),
    ],
    ids=["reward nan", "reward inf", "gradient", "micro-batch"],
)
def test_non_finite_value_spares_weights(settings: dict[str, Any], message: str) -> None:
    module = make(**settings)
    before = weights(module)
    with pytest.raises(NonFiniteError, match=message):
        fit(module)
    assert torch.equal(before, weights(module))


def test_out_of_memory_names_the_setting() -> None:
    def greedy_for_memory(*args: Tensor) -> Any:
        return ppo_clip(*args), torch.empty(1 << 58, dtype=torch.uint8)  # a real allocation, and more than any machine has

    with pytest.raises(OutOfMemoryError, match=r"^out of memory in the update phase .*: lower module.micro_batch_tokens, .*$") as caught:
        fit(make(algorithm={"loss": greedy_for_memory}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"temperature": 0.0}, "temperature=0.0"),  # log-probs would be divided by it
        ({"context_temperature": -0.5}, "context_temperature=-0.5"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens=0"),
        ({"also_learn_from": ["queries"]}, r"also_learn_from=\['queries'\]: queries is not one of query, negative"),
        ({"pathwise_weight": -0.1}, r"pathwise_weight=-0\.1.*at least 0"),
        ({"pathwise_weight": math.nan}, "pathwise_weight=nan.*at least 0"),
        ({"score_function_weight": -1.0}, r"score_function_weight=-1\.0.*at least 0"),
        ({"score_function_weight": 0.0}, "nothing would be learned"),
        ({"pathwise_weight": 0.7, "pathwise_roles": ["query", "answer"]}, "answer is not one of positive, query, negative"),
        ({"pathwise_weight": 0.7, "pathwise_roles": []}, r"pathwise_roles=\[\].*no embedding would be moved"),
        ({"pathwise_weight": 0.7, "pathwise_roles": None}, r"pathwise_roles=\[\].*no embedding would be moved"),
        ({"gradient_parts_every_n_rollout_batches": -1}, "gradient_parts_every_n_rollout_batches=-1"),
        ({"pathwise_weight": 0.7, "encoder": "frozen"}, r"pathwise_weight=0\.7.*policy\.encoder=frozen"),
        ({"pathwise_weight": 0.7, "algorithm": {"min_group_std": 0.1}}, r"pathwise_weight=0\.7.*min_group_std=0\.1"),
        (
            {"pathwise_weight": 0.7, "score_function_weight": 0.0, "algorithm": {"kl_coef": 0.1}},
            r"score_function_weight=0 leaves out.*kl_coef=0\.1",
        ),
        (
            {"pathwise_weight": 0.7, "score_function_weight": 0.0, "algorithm": {"token_cost": 0.1}},
            r"score_function_weight=0 leaves out.*token_cost=0\.1",
        ),
        ({"distill_weight": -1.0}, "distill_weight=-1.0.*at least 0"),
        ({"distill_loss": "mse"}, "distill_loss='mse': it is similarity or cosine"),
        ({"distill_weight": 1.0, "encoder": "frozen"}, r"distill_weight=1\.0.*policy\.encoder=frozen"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_roles_may_be_null_or_empty() -> None:
    module = make(also_learn_from=None, encoder="frozen", pathwise_roles=[])
    assert module.hparams["also_learn_from"] == module.hparams["pathwise_roles"] == ()


def test_negatives_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one number of negatives"):
        fit(make(), [[*TRIPLETS, Triplet("file.jsonl:9", "a query", "a document", ())]])
    bare = [Triplet(t.id, t.positive, t.positive, ()) for t in TRIPLETS]
    with pytest.raises(ValueError, match=r"also_learn_from names negatives, and the records have none"):
        fit(make(unsupervised, also_learn_from=["negative"]), [bare])
    fit(make(unsupervised, also_learn_from=["query"]), [bare])
    with pytest.raises(ValueError, match=r"pathwise_roles=.*the records have no negatives"):
        fit(make(listwise, pathwise_weight=0.7, pathwise_roles=["negative"]), [bare])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_unsupported_precision(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer.precision={precision}: use bf16-mixed or 32-true"):
        fit(make(), precision=precision)
