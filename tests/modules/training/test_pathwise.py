"""The pathwise term against plain autograd. That both terms are the derivative of an objective: test_pathwise_proof.py."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.losses import constant, reinforce
from src.modules.objectives.pathwise import first_of_group, pathwise_loss, reward_and_gradients
from src.modules.objectives.rewards import document, listwise, paper, unsupervised
from src.modules.objectives.roles import role_reward
from src.modules.policy.attention.shared_prompt import checkpoint_contexts, pack, pool_packed, unpack
from src.modules.policy.lora import add_lora
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.hf import HFEngine
from src.modules.training.experience import Context
from src.modules.types import ROLES, Embeddings, Reward, Rollouts
from tests.builders import small_policy, some_rollouts
from tests.modules.policy.attention.test_shared_prompt import LENGTHS, grouped_rollouts
from tests.modules.test_grace import TRIPLETS, make, weights

BATCH = TRIPLETS[:4]
NEW = ("score_function_weight", "pathwise_weight", "pathwise_roles", "gradient_parts_every_n_rollout_batches")


def built(reward: Any = listwise, pooling: str = "mean", layer: int = -1, lora: bool = False, **settings: Any) -> GRACE:
    """A module whose rationales end by chance, early and late; its term is on and measured in every batch, unless told otherwise."""
    defaults = {"pathwise_weight": 0.7, "gradient_parts_every_n_rollout_batches": 0, "algorithm": {"truncation": "none"}}
    module = make(reward, **(defaults | settings))
    module.policy.pooling, module.policy.layer = pooling, layer
    module.settings = replace(module.settings, pooling=pooling, layer=layer)
    module.policy.model.generation_config.eos_token_id = list(range(5, 65))
    if lora:
        torch.manual_seed(0)
        add_lora(module.policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return module


class Gradients(L.Callback):
    """Keeps the gradient of every update as one vector, and the report of every batch."""

    def __init__(self) -> None:
        self.of_updates: list[Tensor] = []
        self.reports: list[Any] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        trained = [p for p in pl_module.policy.parameters() if p.requires_grad]
        self.of_updates.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.clone()).flatten() for p in trained]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.reports.append(pl_module.batch_metrics)


def trainer_of(*callbacks: L.Callback, precision: Any = "32-true", epochs: int = 1) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", precision=precision, max_epochs=epochs, callbacks=list(callbacks), **quiet)


def fit(module: GRACE, batch: Any = BATCH, precision: Any = "32-true") -> Gradients:
    """What one batch does."""
    seen = Gradients()
    trainer_of(seen, precision=precision).fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    return seen


def off(ours: Tensor, exact: Tensor) -> float:
    """The distance as a share of the exact gradient's length."""
    return float((ours - exact).norm() / exact.norm())


# ---- the oracle: all sides in one graph


def read_plainly(policy: Policy, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, D], and log-probs [N, T] of the rationales' tokens, by transformers' own forward pass of padded rows."""
    output = policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long(), output_hidden_states=True)
    rows = []
    for states, start, end in zip(
        output.hidden_states[policy.layer], rollouts.text_starts.tolist(), rollouts.lengths.tolist(), strict=True
    ):
        own = states[start:end]
        rows.append({"mean": own.mean(dim=0), "eos": own[-1], "max": own.max(dim=0).values}[policy.pooling])
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    return normalize(torch.stack(rows), dim=-1), logprobs * rollouts.rationale_mask[:, 1:]


def parts_of_loss(module: GRACE, batch: Any = BATCH) -> tuple[Tensor, Tensor]:
    """Minus both parts of the objective, not weighted, of a first batch of one update with the token mean and grpo."""
    h, k = module.hparams, module.hparams["num_generations"]
    with torch.no_grad():
        scored = module.collector.collect(batch, 0)
    units, credit, tokens = {}, torch.zeros(()), 0
    for side, part in scored.roles.items():
        own, logprobs = read_plainly(module.policy, part.rollouts)
        units[side] = own.unflatten(0, (-1, k))
        keep = part.rollouts.finished.view(-1, k) | (module.algorithm.truncation != "mask")
        advantages = grpo(role_reward(module.reward, scored.embeddings, side)(part.embeddings), keep).flatten().unsqueeze(1)
        credit = credit + (advantages * logprobs * keep.flatten().unsqueeze(1)).sum()
        tokens += int((part.rollouts.rationale_lengths * keep.flatten()).sum())
    ones = {side: unit[:, 0] for side, unit in units.items()}
    if scored.context is not None:
        names, rollouts = scored.context_roles, scored.context
        sizes = [len(batch) * (len(batch[0].negatives) if side == "negative" else 1) for side in names]
        ones |= dict(zip(names, read_plainly(module.policy, rollouts)[0].split(sizes), strict=True))
    negative = ones["negative"].unflatten(0, (len(batch), -1)) if batch[0].negatives else scored.embeddings.negative
    e = Embeddings(ones["query"], units["positive"], negative)
    e = replace(e, **{side: getattr(e, side).detach() for side in ROLES if side not in h["pathwise_roles"]})
    return -credit / max(tokens, 1), -(module.pathwise_reward or module.reward)(e).total.mean()


def oracle(module: GRACE, batch: Any = BATCH) -> tuple[Tensor, Tensor]:
    """The gradients of both parts of the loss with their weights."""
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    found = []
    for part, weight in zip(parts_of_loss(module, batch), ("score_function_weight", "pathwise_weight"), strict=True):
        own = torch.autograd.grad(module.hparams[weight] * part, trained, retain_graph=True, allow_unused=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(own, trained, strict=True)]))
    return found[0], found[1]


# ---- functions


def random_embeddings(m: int, b: int = 3, k: int = 2, d: int = 5) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    return Embeddings.normalised(*(torch.randn(*shape, d, generator=generator, dtype=torch.float64) for shape in ((b,), (b, k), (b, m))))


@pytest.mark.parametrize(("reward", "m"), [(paper, 2), (document, 2), (listwise, 2), (listwise, 0), (unsupervised, 0)])
def test_reward_gradients_are_finite_differences(reward: Any, m: int) -> None:
    e = random_embeddings(m)
    total, found = reward_and_gradients(reward, e)
    torch.testing.assert_close(total.total.double(), reward(e).total.double(), atol=1e-5, rtol=1e-5)
    step = 1e-5
    for side in ROLES:
        exact = torch.zeros_like(getattr(e, side))
        for place in range(exact.numel()):
            values = []
            for sign in (step, -step):
                moved = getattr(e, side).clone()
                moved.view(-1)[place] += sign
                values.append(reward(replace(e, **{side: moved})).total.mean(dim=1).sum())
            exact.view(-1)[place] = (values[0] - values[1]) / (2 * step)
        ours = found.by_role[side]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ROLES)
def test_reward_gradients_of_sides_that_are_not_asked_for_are_0(side: Any) -> None:
    e = random_embeddings(2)
    found, everything = reward_and_gradients(listwise, e, [side])[1].by_role, reward_and_gradients(listwise, e)[1].by_role
    for other in ROLES:
        expected = everything[other]
        assert torch.equal(found[other], expected if other == side else torch.zeros_like(expected))


def test_reward_gradients_are_there_without_a_graph_around_them() -> None:
    e = random_embeddings(2)
    with torch.no_grad():
        reward, found = reward_and_gradients(document, e)
    assert float(found.by_role["positive"].norm()) > 0
    assert not found.by_role["positive"].requires_grad
    assert not reward.total.requires_grad


def test_the_loss_has_the_gradient_of_the_rewards_through_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    h, g = (torch.randn(4, 6, generator=generator, dtype=torch.float32) for _ in range(2))
    h.requires_grad_()
    (ours,) = torch.autograd.grad(pathwise_loss(h, g), h)
    unit = h.detach() / h.detach().norm(dim=1, keepdim=True)
    along = (g * unit).sum(dim=1, keepdim=True) * unit
    torch.testing.assert_close(ours, -(g - along) / h.detach().norm(dim=1, keepdim=True))


def test_the_first_of_a_group_has_the_gradient() -> None:
    spread = first_of_group(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3)
    assert spread.tolist() == [[1, 2], [0, 0], [0, 0], [3, 4], [0, 0], [0, 0]]


def test_context_is_selected_by_instance() -> None:
    rollouts = some_rollouts(small_policy(), (1, 2, 3, 4, 5, 6, 7, 8, 9))
    context = Context(rollouts, torch.arange(9.0).unsqueeze(1), torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2]))
    middle = context.select(torch.tensor([1]))
    assert middle is not None
    assert middle.gradients.flatten().tolist() == [1, 5, 6]
    assert middle.rollouts.rationale_lengths.tolist() == [2, 6, 7]
    assert context.select(torch.tensor([3])) is None


@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
def test_pool_packed_is_pooling_of_the_unpacked_states(pooling: Any) -> None:
    rollouts, groups = grouped_rollouts(small_policy(), LENGTHS)  # several rollouts, prompts of different lengths, empty rationales
    packed = pack(rollouts, groups)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*packed.input_ids.shape, 7, generator=generator, requires_grad=True)
    ours, expected = pool_packed(states, packed, rollouts, pooling), pool(unpack(states, packed), rollouts.pooling_mask, pooling)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    upstream = torch.randn(ours.shape, generator=generator)
    one, other = (torch.autograd.grad((values * upstream).sum(), states)[0] for values in (ours, expected))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "lora"])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
def test_forward_embeds_as_embed_does(pooling: Any, layer: int, kind: str) -> None:
    policy = small_policy().train()
    policy.pooling, policy.layer = pooling, layer
    if kind == "checkpointing":
        policy.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(policy.model)})
    if kind == "lora":
        torch.manual_seed(0)
        add_lora(policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    expected, (logprobs, _, nothing) = policy.embed(rollouts), policy(rollouts, groups)
    assert nothing is None
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    trained = [p for p in policy.parameters() if p.requires_grad]
    slow = torch.autograd.grad((expected * upstream).sum(), trained, allow_unused=True)
    for given in (groups, None):
        values, entropies, ours = policy(rollouts, given, logprobs=False, embeddings=True)
        assert values is None
        assert entropies is None
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        fast = torch.autograd.grad((ours * upstream).sum(), trained, allow_unused=True)
        scale = max(float(g.abs().max()) for g in slow if g is not None)
        for one, other in zip(fast, slow, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=1e-4)
        together, _, again = policy(rollouts, given, embeddings=True)
        torch.testing.assert_close(together, logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again, ours, atol=1e-6, rtol=1e-6)


# ---- a training step


SETTINGS: dict[str, dict[str, Any]] = {
    "listwise": {},
    "paper": {"reward": paper},
    "document": {"reward": document},
    "last token": {"pooling": "eos"},
    "greatest": {"pooling": "max"},
    "inner layer": {"layer": -2},
    "adapters": {"lora": True},
    "another reward": {"reward": document, "pathwise_reward": listwise},
    "positives": {"pathwise_roles": ["positive"]},
    "queries": {"pathwise_roles": ["query"]},
    "negatives": {"pathwise_roles": ["negative"]},
    "pathwise alone": {"score_function_weight": 0.0},
    "queries alone": {"score_function_weight": 0.0, "pathwise_roles": ["query"]},
    "queries learned from": {"also_learn_from": ["query"]},
    "all learned from": {"also_learn_from": ["query", "negative"], "score_function_weight": 0.3},
    "masked": {"algorithm": {"truncation": "mask"}, "max_new_tokens": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_of_a_step_is_that_of_one_graph_whatever_the_micro_batch(name: str) -> None:
    score, pathwise = oracle(built(**SETTINGS[name]))
    assert float(pathwise.norm()) > 1e-3
    for tokens in (10_000, 90, 1):
        seen = fit(built(**SETTINGS[name], micro_batch_tokens=tokens))
        assert len(seen.of_updates) == 1
        assert off(seen.of_updates[0], score + pathwise) < 1e-4


def test_instances_without_negatives_have_the_gradient_of_one_graph() -> None:
    bare = [replace(triplet, negatives=()) for triplet in BATCH]
    score, pathwise = oracle(built(), bare)
    assert off(fit(built(), bare).of_updates[0], score + pathwise) < 1e-4


def test_negatives_alone_are_refused_where_there_are_none() -> None:
    bare = [replace(triplet, negatives=()) for triplet in BATCH]
    with pytest.raises(ValueError, match=r"pathwise_roles=.*the records have no negatives"):
        fit(built(pathwise_roles=["negative"]), bare)


def test_two_negatives_an_instance_have_the_gradient_of_one_graph() -> None:
    more = [replace(triplet, negatives=(*triplet.negatives, triplet.query[::-1])) for triplet in BATCH]
    score, pathwise = oracle(built(), more)
    assert off(fit(built(), more).of_updates[0], score + pathwise) < 1e-4


def test_rollouts_that_are_masked_out_of_the_loss_move_their_embeddings() -> None:
    module = built(**SETTINGS["masked"])
    seen = fit(module)
    assert 0 < int(seen.reports[0].finished.sum()) < seen.reports[0].finished.numel()
    nothing = built(algorithm={"truncation": "mask"}, max_new_tokens=1, seed=2)  # of which none finishes
    nothing.policy.model.generation_config.eos_token_id = nothing.policy.tokenizer.eos_token_id
    seen = fit(nothing)
    assert not seen.reports[0].finished.any()
    assert seen.reports[0].update["updates"] == 1
    assert float(seen.of_updates[0].norm()) > 1e-3


def test_updates_of_weights_that_stand_still_add_up_to_as_many_times_the_one() -> None:
    """With sums over tokens, divided by rollouts alone, both parts of an update are means over its instances: here half of them each."""
    algorithm = {"loss": reinforce, "aggregation": partial(constant, tokens=1), "truncation": "none"}
    one, two, many = (
        fit(built(algorithm={**algorithm, "updates_per_batch": updates}, learning_rate=0.0)).of_updates for updates in (1, 2, 7)
    )
    assert (len(two), len(many)) == (2, 4)  # more updates than instances: those without any are left out
    assert off(sum(two), 2 * one[0]) < 1e-4
    assert off(sum(many), 4 * one[0]) < 1e-4
    assert off(two[0], two[1]) > 0.1


def test_the_derivative_is_held_over_updates_and_embeddings_are_taken_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("src.modules.grace.reward_and_gradients", lambda *how: taken.append(reward_and_gradients(*how)) or taken[-1])
    moving, still = (
        fit(built(algorithm={"truncation": "none", "updates_per_batch": 2}, learning_rate=rate)).of_updates for rate in (1e-2, 0.0)
    )
    assert len(taken) == 2  # once for each of the two runs
    assert torch.equal(moving[0], still[0])
    assert off(moving[1], still[1]) > 1e-2


def test_passes_are_made_for_what_takes_part_and_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.modules.grace.require_readable", lambda policy: None)  # which has passes of its own

    def passes(**settings: Any) -> list[tuple[int, bool, bool]]:
        """Rollouts, log-probs and embeddings of each pass of an update."""
        module, seen = built(**settings), []
        forward = module.policy.forward

        def watched(part: Rollouts, *how: Any, logprobs: bool = True, embeddings: bool = False) -> Any:
            seen.append((len(part), logprobs, embeddings))
            return forward(part, *how, logprobs=logprobs, embeddings=embeddings)

        monkeypatch.setattr(module.policy, "forward", watched)
        fit(module)
        return seen

    groups, others = 4 * 3, 4 + 4
    assert passes(pathwise_weight=0.0) == [(groups, True, False)]
    assert passes() == [(groups, True, True), (others, False, True)]
    assert passes(pathwise_roles=["positive"]) == [(groups, True, True)]
    assert passes(pathwise_roles=["query"]) == [(groups, True, False), (4, False, True)]
    assert passes(score_function_weight=0.0) == [(groups, False, True), (others, False, True)]
    assert passes(score_function_weight=0.0, pathwise_roles=["negative"]) == [(4, False, True)]
    # of a query that is learned from, the first rollout stands for the query in the rewards
    assert passes(score_function_weight=0.0, also_learn_from=["query"]) == [(groups + 4, False, True), (4, False, True)]
    measured = [(groups, True, False), (groups, False, True), (others, False, True)]
    assert passes(gradient_parts_every_n_rollout_batches=1) == measured


def test_without_the_score_function_no_loss_is_reported() -> None:
    update = fit(built(score_function_weight=0.0, gradient_parts_every_n_rollout_batches=1)).reports[0].update
    assert set(update) == {"grad_norm", "pathwise_reward", "updates", "groups"}
    assert update["grad_norm"] > 0


@pytest.mark.parametrize("settings", [{}, {"also_learn_from": ["query"]}, {"lora": True}, {"algorithm": {"truncation": "mask"}}])
def test_norms_and_cosine_are_those_of_one_graph_and_measuring_changes_no_gradient(settings: dict[str, Any]) -> None:
    score, pathwise = oracle(built(**settings))
    measured, plain = fit(built(**settings, gradient_parts_every_n_rollout_batches=1)), fit(built(**settings))
    assert off(measured.of_updates[0], plain.of_updates[0]) < 1e-5
    update = measured.reports[0].update
    assert update["score_function_grad_norm"] == pytest.approx(float(score.norm()), rel=1e-4)
    assert update["pathwise_grad_norm"] == pytest.approx(float(pathwise.norm()), rel=1e-4)
    assert update["gradient_parts_cosine"] == pytest.approx(float(score @ pathwise / (score.norm() * pathwise.norm())), abs=1e-4)
    assert update["pathwise_reward"] == pytest.approx(float(measured.reports[0].reward.total.mean()), rel=1e-5)
    rest = {name: value for name, value in update.items() if name in plain.reports[0].update}
    assert rest == pytest.approx(plain.reports[0].update, rel=1e-4, abs=1e-6)
    assert len(update) == len(rest) + 3


def test_parts_are_measured_every_so_many_batches_in_the_first_update() -> None:
    module, seen = built(gradient_parts_every_n_rollout_batches=2, algorithm={"updates_per_batch": 2}), Gradients()
    trainer_of(seen).fit(module, DataLoader([BATCH] * 3, batch_size=None))  # type: ignore[arg-type]
    assert ["gradient_parts_cosine" in report.update for report in seen.reports] == [True, False, True]
    assert all("pathwise_reward" in report.update for report in seen.reports)
    assert "gradient_parts_cosine" not in fit(built(pathwise_weight=0.0, gradient_parts_every_n_rollout_batches=1)).reports[0].update


def test_the_term_that_is_off_changes_nothing() -> None:
    published = make(listwise, algorithm={"truncation": "none"})
    published.policy.model.generation_config.eos_token_id = list(range(5, 65))
    ours, theirs = fit(built(pathwise_weight=0.0, gradient_parts_every_n_rollout_batches=1)), fit(published)
    assert torch.equal(ours.of_updates[0], theirs.of_updates[0])
    assert "pathwise_reward" not in ours.reports[0].update


class Replayed(HFEngine):
    """Writes the rationales of another run again; embeddings and log-probs come from a pass."""

    def __init__(self, max_new_tokens: int, written: list[Rollouts] | None = None) -> None:
        super().__init__(max_new_tokens)
        self.written, self.given = [], written

    def generate(self, policy: Policy, prompts: Prompts, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = self.given.pop(0) if self.given else super().generate(policy, prompts, *args, **kwargs)
        self.written.append(replace(rollouts, logprobs=None, embeddings=None, prefix_embeddings=None))
        return self.written[-1]


@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
def test_in_bfloat16_arithmetic_the_gradient_is_near_that_of_float32(pooling: str) -> None:
    gradients, written = [], None
    for precision in ("32-true", "bf16-mixed"):
        module = built(document, pooling=pooling, gradient_parts_every_n_rollout_batches=1)
        module.engine = Replayed(6, written)
        seen = fit(module, precision=precision)
        written = module.engine.written
        gradients.append(seen.of_updates[0])
        assert seen.reports[0].update["pathwise_grad_norm"] > 0
    exact, rounded = gradients
    assert float(exact @ rounded / (exact.norm() * rounded.norm())) > 0.98


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pathwise_weight": -0.1}, r"pathwise_weight=-0\.1.*at least 0"),
        ({"score_function_weight": -1.0}, r"score_function_weight=-1\.0.*at least 0"),
        ({"score_function_weight": 0.0, "pathwise_weight": 0.0}, "nothing would be learned"),
        ({"pathwise_roles": ["query", "answer"]}, "pathwise_roles=.*answer is not one of positive, query, negative"),
        ({"pathwise_roles": []}, r"pathwise_roles=\[\].*no embedding would be moved"),
        ({"pathwise_roles": None}, r"pathwise_roles=\[\].*no embedding would be moved"),
        ({"pathwise_weight": float("nan")}, "pathwise_weight=nan.*at least 0"),
        ({"gradient_parts_every_n_rollout_batches": -1}, "gradient_parts_every_n_rollout_batches=-1"),
        ({"encoder": "frozen"}, r"pathwise_weight=0\.7.*policy\.encoder=frozen"),
        ({"algorithm": {"min_group_std": 0.1}}, r"pathwise_weight=0\.7.*min_group_std=0\.1"),
        ({"score_function_weight": 0.0, "algorithm": {"kl_coef": 0.1}}, r"score_function_weight=0 leaves out.*kl_coef=0\.1"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(**settings)


def test_without_the_term_a_frozen_encoder_and_no_sides_are_fine() -> None:
    assert built(pathwise_weight=0.0, encoder="frozen", pathwise_roles=[]).hparams["pathwise_roles"] == ()


def by_rank(e: Embeddings) -> Reward:
    """How many of the batch's queries are farther from a rollout than its own: a number without a derivative."""
    similarity = torch.einsum("ikd,jd->ikj", e.positive, e.query)
    place = similarity.argsort(dim=2).argsort(dim=2).diagonal(dim1=0, dim2=2).T.float()
    return Reward({"rank": place}, {"rank": 1.0}, place)


def detached(e: Embeddings) -> Reward:
    found = document(e)
    return replace(found, total=found.total.detach())


def of_positives(e: Embeddings) -> Reward:
    """Looks at no query and at no negative."""
    total = e.positive.sum(dim=2)
    return Reward({"sum": total}, {"sum": 1.0}, total)


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": by_rank},
        {"reward": detached},
        {"pathwise_reward": by_rank},
        {"reward": of_positives, "pathwise_roles": ["query", "negative"]},
    ],
)
def test_a_reward_without_a_derivative_is_refused_at_the_first_batch(settings: dict[str, Any]) -> None:
    module = built(**settings)
    before = weights(module)
    with pytest.raises(ValueError, match=r"not differentiable in the embeddings .*pathwise_reward"):
        fit(module)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def test_a_reward_by_rank_may_move_the_sampling_beside_another_that_moves_the_embeddings() -> None:
    score, pathwise = oracle(built(by_rank, pathwise_reward=document))
    assert off(fit(built(by_rank, pathwise_reward=document)).of_updates[0], score + pathwise) < 1e-4


def test_one_instance_a_batch_has_a_gradient_by_document_and_listwise_says_what_it_needs() -> None:
    score, pathwise = oracle(built(document), BATCH[:1])
    assert off(fit(built(document), BATCH[:1]).of_updates[0], score + pathwise) < 1e-4
    for settings in ({}, {"reward": document, "pathwise_reward": listwise}):
        with pytest.raises(ValueError, match="at least 2 instances"):
            fit(built(**settings), BATCH[:1])


# ---- checkpoints


def test_a_run_from_before_the_term_is_gone_on_with(tmp_path: Path) -> None:
    path, loader = tmp_path / "old.ckpt", DataLoader([BATCH], batch_size=None)  # type: ignore[arg-type]
    begun, trainer = built(pathwise_weight=0.0), trainer_of()
    trainer.fit(begun, loader)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert {name: checkpoint["hyper_parameters"][name] for name in NEW} == {name: begun.hparams[name] for name in NEW}
    assert "pathwise_reward" not in checkpoint["hyper_parameters"]
    for name in NEW:
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    module, seen = built(gradient_parts_every_n_rollout_batches=1), Gradients()
    trainer_of(seen, epochs=2).fit(module, loader, ckpt_path=path, weights_only=True)
    assert module.rollout_batches == 2
    assert len(seen.reports) == 1
    assert seen.reports[0].update["pathwise_grad_norm"] > 0


def test_a_run_with_the_term_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    loader = DataLoader([BATCH], batch_size=None)  # type: ignore[arg-type]
    whole = built(also_learn_from=["query"], algorithm={"updates_per_batch": 2})
    trainer_of(epochs=2).fit(whole, loader)
    half, trainer = built(also_learn_from=["query"], algorithm={"updates_per_batch": 2}), trainer_of()
    trainer.fit(half, loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = built(also_learn_from=["query"], algorithm={"updates_per_batch": 2})
    trainer_of(epochs=2).fit(rest, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))
