from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.losses import constant, sequence_mean, token_mean


def mean_over_tokens(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows).mean()


def mean_of_means(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([row.mean() for row in rows]).mean()


def mean_of_sums_over_seven(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([row.sum() / 7 for row in rows]).mean()


@pytest.mark.parametrize(
    ("aggregation", "oracle"),
    [(token_mean, mean_over_tokens), (sequence_mean, mean_of_means), (partial(constant, tokens=7), mean_of_sums_over_seven)],
)
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 9999))
def test_weights_give_the_sum_its_name(aggregation, oracle, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, generator=generator) for length in lengths]
    weighted = sum(w * row.sum() for w, row in zip(aggregation(torch.tensor(lengths)), rows, strict=True))
    torch.testing.assert_close(weighted, oracle(rows))


@pytest.mark.parametrize("aggregation", [token_mean, sequence_mean, partial(constant, tokens=7)])
def test_an_empty_rationale_is_no_division_by_zero(aggregation):
    assert torch.isfinite(aggregation(torch.tensor([0, 3]))).all()
    assert torch.isfinite(aggregation(torch.tensor([0]))).all()
