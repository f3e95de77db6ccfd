from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.objectives.rewards import document, listwise, paper
from src.modules.objectives.roles import ids_of, role_reward, texts_of
from src.modules.types import Embeddings
from src.records import Triplet
from tests.oracles import consistency_oracle

B, K, M, D = 4, 3, 2, 8


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1)


@pytest.fixture
def embeddings() -> Embeddings:
    torch.manual_seed(0)
    return Embeddings(unit(B), unit(B, K), unit(B, M))


def test_texts_and_ids_are_in_one_order() -> None:
    batch = [Triplet("f:1", "q1", "p1", ("a", "b")), Triplet("f:2", "q2", "p2", ("c", "d"))]
    assert [texts_of(batch, role) for role in ("positive", "query", "negative")] == [["p1", "p2"], ["q1", "q2"], ["a", "b", "c", "d"]]
    assert ids_of(batch, "query") == ("f:1", "f:2")
    assert ids_of(batch, "negative") == ("f:1", "f:1", "f:2", "f:2")


def test_query_reward_has_the_published_terms(embeddings: Embeddings) -> None:
    """Those that cancel out of a positive's advantage."""
    own, positive = unit(B, K + 1), embeddings.positive
    got = role_reward(paper, embeddings, "query")(own)
    lambda1, lambda2, tau = 0.2, 0.2, 0.1
    for i in range(B):
        consistency = sum(consistency_oracle(positive, i, k) for k in range(K)) / K
        for k, query in enumerate(own[i]):
            near = sum(float(query @ positive[i, rollout]) for rollout in range(K)) / K
            far = sum(float(query @ embeddings.negative[i, m]) for m in range(M))
            hard = sum(max(float(query @ positive[j, r]) for r in range(K)) for j in range(B) if j != i) / (B - 1)
            assert float(got[i, k]) == pytest.approx(float((near - far + lambda1 * consistency - lambda2 * hard) / tau), abs=1e-6)


@pytest.mark.parametrize("reward", [paper, document, listwise])
@pytest.mark.parametrize("role", ["positive", "query", "negative"])
def test_role_reward_is_the_instances_mean(reward: Any, role: Any, embeddings: Embeddings) -> None:
    """A rollout of a query or a negative gets what its instance gets with it in the place of the text."""
    if role == "positive":
        torch.testing.assert_close(role_reward(reward, embeddings, role)(embeddings.positive), reward(embeddings).total)
        return
    own = unit(B if role == "query" else B * M, K)
    got = role_reward(reward, embeddings, role)(own)
    assert got.shape == own.shape[:2]
    for text in range(len(own)):
        for k in range(K):
            i, query, negative = text, embeddings.query.clone(), embeddings.negative.clone()
            if role == "query":  # rollouts k of all queries together
                query = own[:, k]
            else:
                i, place = divmod(text, M)
                negative[:, place] = own.unflatten(0, (B, M))[:, place, k]
            expected = reward(Embeddings(query, embeddings.positive, negative)).total[i].mean()
            torch.testing.assert_close(got[text, k], expected)


def test_unlike_negatives_have_higher_rewards(embeddings: Embeddings) -> None:
    query = embeddings.query.repeat_interleave(M, dim=0)
    own = torch.stack([query, -query], dim=1)  # the query itself, and its opposite
    for reward in (paper, listwise):
        got = role_reward(reward, embeddings, "negative")(own)
        assert (got[:, 1] > got[:, 0]).all()
