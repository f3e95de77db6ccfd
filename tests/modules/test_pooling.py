import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.pooling import masked_mean
from tests.oracles import mean_of_selected


def random_case(n: int, t: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, t, generator=generator) < 0.5
    mask[torch.arange(n), torch.randint(t, (n,), generator=generator)] = True  # at least one token a row
    return torch.randn(n, t, d, generator=generator), mask


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 4), t=st.integers(1, 9), d=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_masked_mean_is_the_loop_forward_and_backward(n: int, t: int, d: int, seed: int) -> None:
    hidden, mask = random_case(n, t, d, seed)
    hidden.requires_grad_()
    fast, slow = masked_mean(hidden, mask), mean_of_selected(hidden, mask)
    upstream = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    (fast_gradient,) = torch.autograd.grad((fast * upstream).sum(), hidden)
    (slow_gradient,) = torch.autograd.grad((slow * upstream).sum(), hidden)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_states_are_summed_in_float32(autocast: bool) -> None:
    hidden, mask = random_case(3, 200, 16, seed=0)
    hidden = hidden.bfloat16() if not autocast else hidden
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pooled = masked_mean(hidden, mask)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), mean_of_selected(hidden, mask), rtol=1e-5, atol=1e-6)


def test_states_outside_the_mask_have_no_say_even_if_not_finite() -> None:
    hidden, mask = random_case(2, 5, 3, seed=1)
    mask[:, 2] = False
    expected = masked_mean(hidden, mask)
    hidden[:, 2] = float("nan")
    torch.testing.assert_close(masked_mean(hidden, mask), expected)


def test_an_embedding_of_zero_tokens_is_refused_by_row() -> None:
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match=r"zero tokens in rows \[1, 2\]"):
        masked_mean(torch.zeros(3, 2, 4), mask)
