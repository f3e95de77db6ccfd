"""The expected nDCG of sampled rankings against the enumeration of all rankings."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from src.modules.objectives.plackett_luce import PlackettLuce, _logprob_of_prefix
from src.modules.objectives.rewards import without_autocast
from src.modules.types import Embeddings
from tests.builders import TRIPLETS, fit, make
from tests.modules.objectives.test_rewards import random_embeddings
from tests.oracles import expected_ndcg

TAU = 0.7


def enumerated(e: Embeddings, depth: int) -> Tensor:
    """[B, K], over all rankings of own document, the others' means and negatives."""
    b, k = e.positive.shape[:2]
    rows = []
    for i in range(b):
        rivals = [e.positive[j].mean(dim=0) for j in range(b) if e.others[i, j]] + list(e.negative[i])
        for r in range(k):
            documents = [e.positive[i, r], *rivals]
            rows.append(expected_ndcg(torch.stack([(e.query[i] * d).sum() for d in documents]) / TAU, depth))
    return torch.stack(rows).view(b, k)


@pytest.mark.parametrize("depth", [2, 10])
@pytest.mark.parametrize("same", [False, True])
def test_reward_and_gradient_are_those_of_all_rankings_of_four_documents(depth: int, same: bool) -> None:
    e = random_embeddings(3, 2, 1, 5, seed=3)
    if same:  # the first two are no negatives of each other
        e = replace(e, same=torch.eye(3, dtype=torch.bool) | torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool))
    leaves = [x.clone().requires_grad_() for x in (e.query, e.positive, e.negative)]
    reward = PlackettLuce(rankings=20000, depth=depth, temperature=TAU)
    sampled = reward(Embeddings(*leaves, same=e.same)).total
    exact = enumerated(Embeddings(*leaves, same=e.same), depth)
    torch.testing.assert_close(sampled, exact, atol=0.01, rtol=0)
    weights = torch.randn(sampled.shape, generator=torch.Generator().manual_seed(0), dtype=sampled.dtype)
    ours, theirs = (torch.autograd.grad((values * weights).sum(), leaves) for values in (sampled, exact))
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, atol=0.03, rtol=0)
        assert right.abs().max() > 0.1


def test_leave_one_out_has_no_bias() -> None:
    """The mean gradient over many pairs of rankings, each the other's baseline, is that of the enumeration."""
    e = random_embeddings(2, 1, 1, 4, seed=0)
    reward, query, gradients = PlackettLuce(rankings=2, temperature=TAU), e.query.clone().requires_grad_(), []
    for _ in range(800):
        gradients.append(torch.autograd.grad(reward(replace(e, query=query)).total.sum(), query)[0])
        reward.remember(e)
    (exact,) = torch.autograd.grad(enumerated(replace(e, query=query), 10).sum(), query)
    found = torch.stack(gradients)
    error = found.std(dim=0) / len(found) ** 0.5
    assert ((found.mean(dim=0) - exact).abs() < 4 * error + 1e-9).all()
    assert found.std(dim=0).max() > 0.05


def test_probability_of_a_prefix() -> None:
    scores, order = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([2, 0, 1])
    p = scores.exp() / scores.exp().sum()
    for places, expected in ((1, p[2]), (2, p[2] * p[0] / (p[0] + p[1])), (3, p[2] * p[0] / (p[0] + p[1]))):
        torch.testing.assert_close(_logprob_of_prefix(scores, order, torch.tensor(places)).exp(), expected)


def test_random_numbers_are_of_the_batch() -> None:
    e, reward = random_embeddings(4, 3, 1, 5, seed=1), PlackettLuce(rankings=4, temperature=TAU)
    first = reward(e).total
    assert torch.equal(reward(e).total, first)
    reward.remember(e)
    second = reward(e).total
    assert not torch.equal(second, first)
    resumed = PlackettLuce(rankings=4, temperature=TAU)
    resumed.load_state_dict(reward.state_dict())
    assert torch.equal(resumed(e).total, second)
    assert torch.equal(without_autocast(reward)(e).total, second)


def test_both_parts_of_the_gradient_learn_from_it() -> None:
    watch = fit(make(PlackettLuce(), pathwise_weight=1.0), [TRIPLETS] * 2)
    assert watch.reports[0].update["pathwise_grad_norm"] > 0
    assert watch.reports[0].update["score_function_grad_norm"] > 0
    assert all(report.reward.terms["ndcg"].std() > 0 for report in watch.reports)


@pytest.mark.parametrize("settings", [{"rankings": 1}, {"depth": 0}])
def test_bad_settings_are_named(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"reward.{next(iter(settings))}="):
        PlackettLuce(**settings)  # type: ignore[arg-type]


def test_a_document_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one has no rival: raise datamodule\.batch_size"):
        PlackettLuce()(random_embeddings(1, 2, 0, 4, seed=0))
