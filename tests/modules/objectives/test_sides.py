from typing import Any

import pytest
import torch

from src.modules.objectives.rewards import document, listwise, paper, unsupervised
from src.modules.objectives.roles import ids_of, role_reward, texts_of
from src.modules.training.experience import interleaving
from src.modules.types import Embeddings
from src.records import Triplet
from tests.modules.test_grace import TRIPLETS, fit, make, weights

B, K, M, D = 4, 3, 2, 8


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1)


@pytest.fixture
def embeddings() -> Embeddings:
    torch.manual_seed(0)
    return Embeddings(unit(B), unit(B, K), unit(B, M))


def test_texts_and_ids_go_side_by_side() -> None:
    batch = [Triplet("f:1", "q1", "p1", ("a", "b")), Triplet("f:2", "q2", "p2", ("c", "d"))]
    assert [texts_of(batch, side) for side in ("positive", "query", "negative")] == [["p1", "p2"], ["q1", "q2"], ["a", "b", "c", "d"]]
    assert ids_of(batch, "query") == ("f:1", "f:2")
    assert ids_of(batch, "negative") == ("f:1", "f:1", "f:2", "f:2")


@pytest.mark.parametrize("reward", [paper, document, listwise])
def test_a_positive_earns_what_the_reward_says(reward: Any, embeddings: Embeddings) -> None:
    torch.testing.assert_close(role_reward(reward, embeddings, "positive")(embeddings.positive), reward(embeddings).total)


def test_a_query_earns_the_published_terms_that_cancel_for_a_positive(embeddings: Embeddings) -> None:
    own = unit(B, K + 1)
    got = role_reward(paper, embeddings, "query")(own)
    lambda1, lambda2, tau = 0.2, 0.2, 0.1
    for i in range(B):
        group = embeddings.positive[i]
        consistency = sum(float(group[a] @ group[b]) for a in range(K) for b in range(K) if a != b) / (K * (K - 1))
        for k in range(K + 1):
            query = own[i, k]
            near = sum(float(query @ group[rollout]) for rollout in range(K)) / K
            far = sum(float(query @ embeddings.negative[i, m]) for m in range(M))
            hard = sum(max(float(query @ embeddings.positive[j, r]) for r in range(K)) for j in range(B) if j != i) / (B - 1)
            expected = (near - far + lambda1 * consistency - lambda2 * hard) / tau
            assert abs(float(got[i, k]) - expected) < 1e-6


@pytest.mark.parametrize("reward", [paper, document, listwise])
@pytest.mark.parametrize("side", ["query", "negative"])
def test_a_rollout_earns_what_its_instance_does_with_it_in_the_texts_place(reward: Any, side: Any, embeddings: Embeddings) -> None:
    own = unit(B if side == "query" else B * M, K)
    got = role_reward(reward, embeddings, side)(own)
    assert got.shape == own.shape[:2]
    for text in range(len(own)):
        for k in range(K):
            query, negative = embeddings.query.clone(), embeddings.negative.clone()
            if side == "query":  # rollouts k of all queries together
                query = own[:, k]
                i = text
            else:
                i, place = divmod(text, M)
                negative[:, place] = own.unflatten(0, (B, M))[:, place, k]
            expected = reward(Embeddings(query, embeddings.positive, negative)).total[i].mean()
            torch.testing.assert_close(got[text, k], expected)


def test_a_negative_earns_by_being_unlike_what_it_is_weighed_against(embeddings: Embeddings) -> None:
    query = embeddings.query.repeat_interleave(M, dim=0)
    own = torch.stack([query, -query], dim=1)  # the query itself, and its opposite
    for reward in (paper, listwise):
        got = role_reward(reward, embeddings, "negative")(own)
        assert (got[:, 1] > got[:, 0]).all()


def test_any_stretch_of_interleaved_sides_holds_the_share_of_each() -> None:
    order = interleaving([4, 8])
    assert sorted(order.tolist()) == list(range(12))
    for part in order.tensor_split(4):
        assert ((part < 4).sum(), (part >= 4).sum()) == (1, 2)
    assert interleaving([5]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("also", "groups"), [([], 1), (["query"], 2), (["query", "negative"], 3)])
def test_the_gradient_is_the_token_mean_over_all_sides_that_are_learned_from(also: list[str], groups: int) -> None:
    settings: dict[str, Any] = {"also_learn_from": also, "algorithm": {"truncation": "none"}}
    watch = fit(make(listwise, **settings), [TRIPLETS])
    start = make(listwise, **settings)  # the same weights, seed and rollouts
    scored = start.collector.collect(TRIPLETS, 0)
    assert list(scored.roles) == ["positive", *also]
    total, tokens = torch.zeros(()), 0
    for name, side in scored.roles.items():
        rewards = role_reward(listwise, scored.embeddings, name)(side.embeddings)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten().unsqueeze(1)
        rollouts = side.rollouts
        logits = start.policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
        mask = rollouts.rationale_mask[:, 1:]
        total = total - (advantages.detach() * logprobs * mask).sum()
        tokens += int(mask.sum())
    (total / tokens).backward()
    for ours, parameter in zip(watch.gradients[0], start.policy.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-3)
    report = watch.reports[0]
    assert report.update["groups"] == groups * len(TRIPLETS)
    assert {side: values.shape for side, values in report.other_rewards.items()} == dict.fromkeys(also, (len(TRIPLETS), 3))


@pytest.mark.parametrize(
    "algorithm",
    [
        {"gae_lambda": 0.9, "updates_per_batch": 2},
        {"greedy_baseline": True, "advantage": lambda rewards, keep, baseline: (rewards - baseline.unsqueeze(1)) * keep},
        {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
        {"min_group_std": 1e9, "max_extra_batches": 1},
    ],
)
def test_it_goes_with_every_algorithm(algorithm: dict[str, Any]) -> None:
    module = make(listwise, also_learn_from=["query", "negative"], algorithm=algorithm)
    before = weights(module)
    reports = fit(module, [TRIPLETS[:4], TRIPLETS[-4:]]).reports
    moved = any(not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert moved == ("min_group_std" not in algorithm)  # a spread that no group has: nothing to learn from
    assert all(report.update["groups"] == (12.0 if moved else 0.0) for report in reports)


def test_negatives_that_are_not_there_cannot_be_learned_from() -> None:
    module = make(unsupervised, also_learn_from=["negative"])
    batch = [Triplet(t.id, t.positive, t.positive, ()) for t in TRIPLETS]
    with pytest.raises(ValueError, match=r"module\.also_learn_from names negatives, and the records have none"):
        fit(module, [batch])
    fit(make(unsupervised, also_learn_from=["query"]), [batch])


def test_a_side_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module\.also_learn_from=\['queries'\]: queries is not one of query, negative"):
        make(also_learn_from=["queries"])
