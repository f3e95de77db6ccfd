"""Instances that share a text, as query or as positive, are not negatives of each other."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.objectives.pathwise import reward_and_gradients
from src.modules.objectives.rewards import document, listwise, paper, unsupervised
from src.modules.objectives.roles import same_texts
from src.modules.types import Embeddings
from src.records import Triplet
from tests.builders import TRIPLETS, fit, make

B, K, M = 4, 3, 2
PAIRS = [(0, 1), (1, 0), (1, 3), (3, 1)]
"""Instances that are the same."""


def embeddings(m: int = M) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    parts = (normalize(torch.randn(*shape, 6, generator=generator, dtype=torch.float64), dim=-1) for shape in ((B,), (B, K), (B, m)))
    same = torch.eye(B, dtype=torch.bool)
    for i, j in PAIRS:
        same[i, j] = True
    return Embeddings(*parts, same)


def negatives_of(i: int) -> list[int]:
    return [j for j in range(B) if j != i and (i, j) not in PAIRS]


def in_batch(form: str, e: Embeddings, i: int, k: int) -> float:
    """The in-batch term of a rollout, one number at a time."""
    to_query = [float(e.positive[i, k] @ e.query[j]) for j in negatives_of(i)]
    if form == "paper":
        values = [max(float(e.query[i] @ e.positive[j, r]) for r in range(K)) for j in negatives_of(i)]
        return -sum(values) / len(values)
    return -max(to_query) if form == "max" else -sum(to_query) / len(to_query)


@pytest.mark.parametrize(
    ("form", "reward", "term", "m"),
    [
        ("paper", paper, "hard", M),
        ("mean", document, "hard", M),
        ("max", partial(document, hard_reduction="max"), "hard", M),
        ("mean", unsupervised, "in_batch", 0),
    ],
)
def test_in_batch_terms_leave_them_out(form: str, reward: Any, term: str, m: int) -> None:
    e = embeddings(m)
    expected = torch.tensor([[in_batch(form, e, i, k) for k in range(K)] for i in range(B)], dtype=torch.float64)
    torch.testing.assert_close(reward(e).terms[term], expected)


def test_listwise_leaves_them_out() -> None:
    e, tau = embeddings(), 0.05
    found = listwise(e, centre="none", temperature=tau).terms
    for i in range(B):
        for k in range(K):
            own = torch.exp(e.positive[i, k] @ e.query[i] / tau)
            queries = own + sum(torch.exp(e.positive[i, k] @ e.query[j] / tau) for j in negatives_of(i))
            rivals = own + sum(torch.exp(e.negative[i, m] @ e.query[i] / tau) for m in range(M))
            rivals = rivals + sum(torch.exp((e.positive[j] @ e.query[i]).mean() / tau) for j in negatives_of(i))
            torch.testing.assert_close(found["to_query"][i, k], (own / queries).log())
            torch.testing.assert_close(found["to_document"][i, k], (own / rivals).log())


@pytest.mark.parametrize("reward", [paper, document, partial(document, hard_reduction="max"), listwise])
def test_without_any_negative_terms_are_finite(reward: Any) -> None:
    e = replace(embeddings(0), same=torch.ones(B, B, dtype=torch.bool))
    reward, gradients = reward_and_gradients(reward, e)
    assert torch.isfinite(reward.total).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.by_role.values())


def test_two_instances_with_one_query_can_reach_the_best_reward() -> None:
    query = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=-1)
    perfect = Embeddings(query, query.unsqueeze(1).expand(2, K, 2), torch.zeros(2, 0, 2), torch.ones(2, 2, dtype=torch.bool))
    assert listwise(perfect, centre="none").terms["to_query"].eq(0).all()  # log 1/2 without the mask


@pytest.mark.parametrize(
    ("query", "positive", "expected"),
    [("q1", "p9", 1), ("q9", "p1", 1), ("q9", "p9", 0), (" q1\n", "p9", 1), ("p1", "q1", 1), ("p1", "p9", 1), ("q9", "q1 ", 1)],
)
def test_same_texts_compares_queries_and_positives(query: str, positive: str, expected: int) -> None:
    batch = [Triplet("f:1", "q1", "p1", ()), Triplet("f:2", "q2", "p2", ()), Triplet("f:3", query, positive, ())]
    same = same_texts(batch, torch.device("cpu"))
    if not expected:
        assert same is None
        return
    wanted = torch.eye(3, dtype=torch.bool)
    wanted[0, 2] = wanted[2, 0] = True
    assert isinstance(same, Tensor)
    assert torch.equal(same, wanted)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_training_leaves_them_out_and_counts_them(weight: float) -> None:
    batch = [*TRIPLETS, replace(TRIPLETS[0], id="twin", positive="Another document of the first query.")]
    report = fit(make(document, pathwise_weight=weight), [batch]).reports[0]
    assert report.false_negatives == 1
    assert torch.isfinite(report.reward.total).all()
    assert fit(make(document), [TRIPLETS]).reports[0].false_negatives == 0
