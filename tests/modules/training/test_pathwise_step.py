"""The pathwise term in a training step against plain autograd; test_pathwise_proof.py shows of what objective it is the derivative."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from src.modules.grace import GRACE
from src.modules.objectives.losses import constant, reinforce
from src.modules.objectives.pathwise import reward_and_gradients
from src.modules.objectives.rewards import document, listwise, paper
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Embeddings, Reward, Rollouts
from tests.builders import TRIPLETS, Watch, fit, loader, make, off, quiet_trainer, weights
from tests.oracles import step_gradients

BATCH = TRIPLETS[:4]
BARE = [replace(triplet, negatives=()) for triplet in BATCH]
TWO_NEGATIVES = [replace(triplet, negatives=(*triplet.negatives, triplet.query[::-1])) for triplet in BATCH]
NEW = ("score_function_weight", "pathwise_weight", "pathwise_roles", "gradient_parts_every_n_rollout_batches")


def built(reward: Any = listwise, **settings: Any) -> GRACE:
    """A module with the pathwise term, whose rationales end early and late."""
    own = {"pathwise_weight": 0.7, "gradient_parts_every_n_rollout_batches": 0, "algorithm": {"truncation": "none"}, "ends_early": True}
    return make(reward, **{**own, **settings})


def by_rank(e: Embeddings) -> Reward:
    """How many of the batch's queries are farther from a rollout than its own: a number without a derivative."""
    similarity = torch.einsum("ikd,jd->ikj", e.positive, e.query)
    place = similarity.argsort(dim=2).argsort(dim=2).diagonal(dim1=0, dim2=2).T.float()
    return Reward({"rank": place}, {"rank": 1.0}, place)


MASKED = {"algorithm": {"truncation": "mask"}, "max_new_tokens": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "listwise": {},
    "paper": {"reward": paper},
    "document": {"reward": document},
    "last token": {"pooling": "eos"},
    "greatest": {"pooling": "max"},
    "inner layer": {"layer": -2},
    "adapters": {"lora": True},
    "another reward": {"reward": document, "pathwise_reward": listwise},
    "reward by rank": {"reward": by_rank, "pathwise_reward": document},
    "positives": {"pathwise_roles": ["positive"]},
    "queries": {"pathwise_roles": ["query"]},
    "negatives": {"pathwise_roles": ["negative"]},
    "pathwise alone": {"score_function_weight": 0.0},
    "queries alone": {"score_function_weight": 0.0, "pathwise_roles": ["query"]},
    "queries learned from": {"also_learn_from": ["query"]},
    "all learned from": {"also_learn_from": ["query", "negative"], "score_function_weight": 0.3},
    "masked": MASKED,
    "no negatives": {"batch": BARE},
    "two negatives": {"batch": TWO_NEGATIVES},
    "one instance": {"reward": document, "batch": BATCH[:1]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_step_gradient_is_that_of_one_graph(name: str) -> None:
    settings = dict(SETTINGS[name])
    batch = settings.pop("batch", BATCH)
    score, pathwise = step_gradients(built(**settings), batch)
    assert float(pathwise.norm()) > 1e-3
    for tokens in (10_000, 90, 1):
        seen = fit(built(**settings, micro_batch_tokens=tokens), [batch])
        assert len(seen.gradients) == 1
        assert off(seen.gradients[0], score + pathwise) < 1e-4


def test_masked_rollouts_move_their_embeddings() -> None:
    finished = fit(built(**MASKED), [BATCH]).reports[0].finished
    assert 0 < int(finished.sum()) < finished.numel()
    seen = fit(built(algorithm={"truncation": "mask"}, max_new_tokens=1, seed=2, ends_early=False), [BATCH])
    assert not seen.reports[0].finished.any()
    assert seen.reports[0].update["updates"] == 1
    assert float(seen.gradients[0].norm()) > 1e-3


def test_updates_without_learning_rate_add_up() -> None:
    """With sums over tokens, divided by rollouts alone, both parts of an update are means over its instances: here half of them each."""
    algorithm = {"loss": reinforce, "aggregation": partial(constant, tokens=1), "truncation": "none"}
    one, two, many = (
        fit(built(algorithm={**algorithm, "updates_per_batch": updates}, learning_rate=0.0), [BATCH]).gradients for updates in (1, 2, 7)
    )
    assert (len(two), len(many)) == (2, 4)  # more updates than instances: those without any are left out
    assert off(sum(two), 2 * one[0]) < 1e-4
    assert off(sum(many), 4 * one[0]) < 1e-4
    assert off(two[0], two[1]) > 0.1


def test_derivative_is_held_over_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("src.modules.grace.reward_and_gradients", lambda *how: taken.append(reward_and_gradients(*how)) or taken[-1])
    algorithm = {"truncation": "none", "updates_per_batch": 2}
    moving, still = (fit(built(algorithm=algorithm, learning_rate=rate), [BATCH]).gradients for rate in (1e-2, 0.0))
    assert len(taken) == 2  # once for each of the two runs
    assert torch.equal(moving[0], still[0])
    assert off(moving[1], still[1]) > 1e-2  # embeddings are computed anew


def test_passes_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.modules.grace.require_readable", lambda *_: None)  # which has passes of its own

    def passes(**settings: Any) -> list[tuple[int, bool, bool]]:
        """Rollouts, log-probs and embeddings of each pass of an update."""
        module, seen = built(**settings), []
        forward = module.policy.forward

        def watched(part: Rollouts, *how: Any, logprobs: bool = True, embeddings: bool = False) -> Any:
            seen.append((len(part), logprobs, embeddings))
            return forward(part, *how, logprobs=logprobs, embeddings=embeddings)

        monkeypatch.setattr(module.policy, "forward", watched)
        fit(module, [BATCH])
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


@pytest.mark.parametrize("settings", [{}, {"also_learn_from": ["query"]}, {"lora": True}, {"algorithm": {"truncation": "mask"}}])
def test_measured_parts_are_those_of_one_graph(settings: dict[str, Any]) -> None:
    score, pathwise = step_gradients(built(**settings), BATCH)
    measured, plain = fit(built(**settings, gradient_parts_every_n_rollout_batches=1), [BATCH]), fit(built(**settings), [BATCH])
    assert off(measured.gradients[0], plain.gradients[0]) < 1e-5
    update = measured.reports[0].update
    assert update["score_function_grad_norm"] == pytest.approx(float(score.norm()), rel=1e-4)
    assert update["pathwise_grad_norm"] == pytest.approx(float(pathwise.norm()), rel=1e-4)
    assert update["gradient_parts_cosine"] == pytest.approx(float(score @ pathwise / (score.norm() * pathwise.norm())), abs=1e-4)
    assert update["pathwise_reward"] == pytest.approx(float(measured.reports[0].reward.total.mean()), rel=1e-5)
    rest = {name: value for name, value in update.items() if name in plain.reports[0].update}
    assert rest == pytest.approx(plain.reports[0].update, rel=1e-4, abs=1e-6)
    assert len(update) == len(rest) + 3


def test_which_batches_report_what() -> None:
    seen = fit(built(gradient_parts_every_n_rollout_batches=2, algorithm={"updates_per_batch": 2}), [BATCH] * 3)
    assert ["gradient_parts_cosine" in report.update for report in seen.reports] == [True, False, True]
    assert all("pathwise_reward" in report.update for report in seen.reports)
    alone = fit(built(score_function_weight=0.0, gradient_parts_every_n_rollout_batches=1), [BATCH]).reports[0].update
    assert set(alone) == {"grad_norm", "pathwise_reward", "updates", "groups"}
    assert alone["grad_norm"] > 0


def test_weight_zero_is_the_published_step() -> None:
    published = fit(make(listwise, algorithm={"truncation": "none"}, ends_early=True), [BATCH])
    ours = fit(built(pathwise_weight=0.0, gradient_parts_every_n_rollout_batches=1), [BATCH])
    assert torch.equal(ours.gradients[0], published.gradients[0])
    assert ours.reports[0].update.keys() == published.reports[0].update.keys()


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
def test_bfloat16_gradient_is_near_float32(pooling: str) -> None:
    gradients, written = [], None
    for precision in ("32-true", "bf16-mixed"):
        engine = Replayed(6, written)
        seen = fit(built(document, pooling=pooling, engine=engine, gradient_parts_every_n_rollout_batches=1), [BATCH], precision=precision)
        written = engine.written
        gradients.append(seen.gradients[0])
        assert seen.reports[0].update["pathwise_grad_norm"] > 0
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.98


def detached(e: Embeddings) -> Reward:
    found = document(e)
    return replace(found, total=found.total.detach())


def of_positives(e: Embeddings) -> Reward:
    """Depends on no query and on no negative."""
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
def test_reward_without_derivative(settings: dict[str, Any]) -> None:
    module = built(**settings)
    before = weights(module)
    with pytest.raises(ValueError, match=r"not differentiable in the embeddings .*pathwise_reward"):
        fit(module, [BATCH])
    assert torch.equal(before, weights(module))


@pytest.mark.parametrize("settings", [{}, {"reward": document, "pathwise_reward": listwise}])
def test_listwise_needs_two_instances(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 2 instances"):
        fit(built(**settings), [BATCH[:1]])


# ---- checkpoints


def test_checkpoint_without_pathwise_settings_resumes(tmp_path: Path) -> None:
    path, begun, trainer = tmp_path / "old.ckpt", built(pathwise_weight=0.0), quiet_trainer()
    trainer.fit(begun, loader([BATCH]))
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert {name: checkpoint["hyper_parameters"][name] for name in NEW} == {name: begun.hparams[name] for name in NEW}
    assert "pathwise_reward" not in checkpoint["hyper_parameters"]
    for name in NEW:
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    module = built(gradient_parts_every_n_rollout_batches=1)
    seen = fit(module, [BATCH], ckpt_path=path, max_epochs=2)
    assert module.rollout_batches == 2
    assert len(seen.reports) == 1
    assert seen.reports[0].update["pathwise_grad_norm"] > 0


def test_resumed_run_has_the_same_weights(tmp_path: Path) -> None:
    straight, half, rest = (built(also_learn_from=["query"], algorithm={"updates_per_batch": 2}) for _ in range(3))
    fit(straight, [BATCH], max_epochs=2)
    trainer = quiet_trainer(Watch())
    trainer.fit(half, loader([BATCH]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, [BATCH], ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    assert torch.equal(weights(straight), weights(rest))
