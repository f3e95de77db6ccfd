import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.info_nce import cosines, info_nce, mean_reciprocal_rank, symmetric_info_nce
from tests.oracles import info_nce_oracle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.floats(0.05, 2.0), st.integers(0, 2**31))
def test_info_nce_is_the_formula(b: int, n: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, documents = (torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_() for rows in (b, n))
    own = torch.randint(n, (b,), generator=generator)
    left_out = (torch.rand(b, n, generator=generator) < 0.3).scatter(1, own.unsqueeze(1), False)
    kept = [[j for j in range(n) if not left_out[i, j]] for i in range(b)]
    expected = info_nce_oracle(
        queries, [[documents[j] for j in row] for row in kept], [kept[i].index(own[i]) for i in range(b)], temperature
    )
    loss = info_nce(queries, documents, own, temperature, left_out)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, (queries, documents)) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_symmetric_is_the_mean_of_both() -> None:
    queries, documents = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    both = [(queries, documents), (documents, queries)]
    expected = sum(info_nce_oracle(left, [list(right)] * 4, [0, 1, 2, 3], 0.05) for left, right in both) / 2
    torch.testing.assert_close(symmetric_info_nce(queries, documents, 0.05), expected, rtol=1e-4, atol=1e-4)


def test_similarities_are_float32_under_autocast() -> None:
    queries, documents = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cosines(queries, documents)
    assert torch.equal(inside, cosines(queries, documents))


def test_mean_reciprocal_rank_of_known_ranks() -> None:
    queries = torch.eye(3)
    documents = torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0, 0.9, 1]])  # the second query prefers its own, so does every other
    assert float(mean_reciprocal_rank(queries, documents)) == 1.0
    assert float(mean_reciprocal_rank(queries, documents[[1, 0, 2]])) == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
