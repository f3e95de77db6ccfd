from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.modules.objectives.advantages import grpo
from src.modules.objectives.rewards import Novelty, document, listwise, paper, unsupervised
from src.modules.types import Embeddings
from tests.oracles import document_oracle, listwise_oracle, novelty_oracle, paper_oracle, unsupervised_oracle

shapes = st.tuples(st.integers(2, 5), st.integers(1, 5), st.integers(0, 3), st.integers(2, 7), st.integers(0, 2**31 - 1))


def random_embeddings(b: int, k: int, m: int, d: int, seed: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(*shape, d, generator=generator, dtype=torch.float64) for shape in ((b,), (b, k), (b, m)))
    return Embeddings.normalised(*drawn)


def agree(fast, slow, e: Embeddings) -> None:
    """Same values, and the same gradient of a random weighting of them."""
    leaves = [x.clone().requires_grad_() for x in (e.query, e.positive, e.negative)]
    zero = sum(x.sum() for x in leaves) * 0
    a, b = fast(Embeddings(*leaves)).total + zero, slow(*leaves) + zero
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    ours, theirs = (torch.autograd.grad((values * weights).sum(), leaves, retain_graph=True) for values in (a, b))
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


share = st.floats(0, 1)
FORMS = {
    "paper": (paper, paper_oracle, {}),
    "document": (document, document_oracle, {"hard_reduction": st.sampled_from(["mean", "max"])}),
    "unsupervised": (unsupervised, lambda q, p, n, *numbers: unsupervised_oracle(q, p, *numbers), {}),
}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, lambda1=share, lambda2=share, tau=st.floats(0.05, 1), data=st.data())
def test_published_rewards_are_their_equations(name, shape, lambda1, lambda2, tau, data):
    reward, oracle, choices = FORMS[name]
    own = {key: data.draw(values) for key, values in choices.items()}
    b, k, m, d, seed = shape
    e = random_embeddings(b, k, 0 if name == "unsupervised" else m, d, seed)
    weights = {"consistency_weight": lambda1, "hard_weight": lambda2, "temperature": tau}
    agree(lambda e: reward(e, **weights, **own), lambda q, p, n: oracle(q, p, n, lambda1, lambda2, tau, *own.values()), e)
    if name == "unsupervised":
        torch.testing.assert_close(unsupervised(e, **weights).total, document(e, **weights).total)


@settings(max_examples=25, deadline=None)
@given(shapes, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1), st.sampled_from(["none", "document", "both"]))
def test_listwise_is_the_equation(shape, to_query, to_document, lambda1, tau, centre):
    weights = {"to_query_weight": to_query, "to_document_weight": to_document, "consistency_weight": lambda1, "temperature": tau}
    agree(
        lambda e: listwise(e, centre=centre, **weights),
        lambda q, p, n: listwise_oracle(q, p, n, to_query, to_document, lambda1, tau, centre),
        random_embeddings(*shape),
    )


def advantages_of(reward, e: Embeddings, **kwargs) -> Tensor:
    total = reward(e, **kwargs).total
    return grpo(total, torch.ones_like(total, dtype=torch.bool))


def test_paper_negatives_cancel_and_documents_do_not():
    e = random_embeddings(6, 8, 2, 16, seed=3)
    e = Embeddings(e.query.float(), e.positive.float(), e.negative.float())
    bare = Embeddings(e.query, e.positive, e.negative[:, :0])
    torch.testing.assert_close(advantages_of(paper, e, hard_weight=0.2), advantages_of(paper, bare, hard_weight=0.0), atol=1e-5, rtol=0)
    moved = (advantages_of(document, e, hard_weight=0.2) - advantages_of(document, bare, hard_weight=0.0)).abs().max()
    assert moved > 0.1


def extended(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, torch.full((*x.shape[:-1], 1), value, dtype=x.dtype)], dim=-1)


@pytest.mark.parametrize("shift", [-0.3, 0.2])
@pytest.mark.parametrize("centre", ["none", "document", "both"])
def test_listwise_ignores_a_common_shift(shift, centre):
    e = random_embeddings(4, 3, 2, 8, seed=1)
    # one more coordinate, held by queries with one sign and by everything else with another, adds `shift` to each similarity
    size = abs(shift) ** 0.5
    sign = 1.0 if shift > 0 else -1.0
    shifted = Embeddings(extended(e.query, size), extended(e.positive, sign * size), extended(e.negative, sign * size))
    torch.testing.assert_close(shifted.query @ shifted.positive[0].T, e.query @ e.positive[0].T + shift)
    torch.testing.assert_close(listwise(shifted, centre=centre).total, listwise(e, centre=centre).total)
    assert (paper(shifted).total - paper(e).total).abs().min() > 1e-3


def test_listwise_ignores_hubs_and_others_do_not():
    # queries share a direction; one rollout takes up more of it, as longer rationales do
    generator = torch.Generator().manual_seed(2)
    shared = torch.zeros(9).index_fill(0, torch.tensor([8]), 1.0)
    query = torch.nn.functional.pad(torch.randn(5, 8, generator=generator), (0, 1))
    query = torch.nn.functional.normalize(query, dim=-1) * 0.8 + 0.6 * shared
    positive = torch.nn.functional.pad(torch.randn(5, 3, 8, generator=generator), (0, 1)) * 0.2
    negative = torch.nn.functional.pad(torch.randn(5, 1, 8, generator=generator), (0, 1)) * 0.2
    hub = positive.clone()
    hub[0, 0] += 0.2 * shared
    # lengths are left as they are: one number is added to the rollout's similarities, and nothing else changes
    before, after = Embeddings(query, positive, negative), Embeddings(query, hub, negative)
    torch.testing.assert_close(listwise(after).total, listwise(before).total)
    for reward in (paper, document, partial(listwise, centre="none")):
        assert (reward(after).total - reward(before).total)[0, 0] > 0.1


def test_listwise_ignores_hub_queries():
    e = random_embeddings(4, 3, 2, 8, seed=5)

    ours = Embeddings(extended(e.query, 0.0), extended(e.positive, 1.0), extended(e.negative, 1.0))
    query = ours.query.clone()
    query[0, -1] = 0.3  # one number is added to the first query's similarities with all documents
    closer = Embeddings(query, ours.positive, ours.negative)
    torch.testing.assert_close(listwise(closer).total, listwise(ours).total)
    assert (paper(closer).total - paper(ours).total)[0].abs().min() > 0.1


def test_terms_add_up():
    e = random_embeddings(3, 4, 2, 8, seed=0)
    for reward, scale in ((paper(e), 10.0), (document(e), 10.0), (listwise(e), 1.0)):
        total = sum(reward.weights[name] * term for name, term in reward.terms.items()) * scale
        torch.testing.assert_close(reward.total, total)
        assert {term.shape for term in reward.terms.values()} == {reward.total.shape}


def test_one_instance_has_no_in_batch_negatives():
    e = random_embeddings(1, 4, 1, 8, seed=0)
    assert paper(e).terms["hard"].eq(0).all()
    assert document(e).terms["hard"].eq(0).all()
    assert document(e, hard_reduction="max").terms["hard"].eq(0).all()
    assert unsupervised(random_embeddings(1, 4, 0, 8, seed=0)).terms["in_batch"].eq(0).all()
    with pytest.raises(ValueError, match="at least 2 instances"):
        listwise(e)


def test_one_rollout_has_no_consistency():
    assert paper(random_embeddings(2, 1, 1, 8, seed=0)).terms["consistency"].eq(0).all()


def test_bad_forms_are_named():
    e = random_embeddings(2, 2, 1, 4, seed=0)
    with pytest.raises(ValueError, match="no term for negatives"):
        unsupervised(e)
    with pytest.raises(ValueError, match="mean or max"):
        document(e, hard_reduction="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none, document or both"):
        listwise(e, centre="query")  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(shape=shapes, previous=st.integers(1, 6), weight=share, tau=st.floats(0.05, 1), base=st.sampled_from([document, listwise]))
def test_novelty_is_the_equation(shape, previous, weight, tau, base):
    b, k, m, d, seed = shape
    e, before = random_embeddings(b, k, m, d, seed), random_embeddings(previous, k, m, d, seed + 1)
    inner = partial(base, temperature=tau)
    reward, scale = Novelty(inner, novelty_weight=weight), 1.0 if base is listwise else 1 / tau
    torch.testing.assert_close(reward(e).total, inner(e).total)  # nothing is remembered yet
    assert "novelty" not in reward(e).terms  # nor is there a term that could be said to have no effect
    reward.remember(before)

    def oracle(q, p, n):
        return novelty_oracle(inner(Embeddings(q, p, n)).total, p, before.query, scale, weight)

    agree(reward, oracle, e)


def test_novelty_of_a_reward_that_remembers():
    inner = Novelty(document, novelty_weight=1.0)
    Novelty(inner).remember(random_embeddings(2, 2, 1, 4, 0))
    assert len(inner.previous) == 2
