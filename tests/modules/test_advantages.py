import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.advantages import grpo
from tests.oracles import grpo_oracle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 2**31 - 1))
def test_grpo_is_the_equation_forward_and_backward(b, k, std, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(b, k, generator=generator, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    keep = torch.rand(b, k, generator=generator) > 0.3 if masked else torch.ones(b, k, dtype=torch.bool)
    a, b_ = grpo(ours, keep, std), grpo_oracle(theirs, keep, std)
    torch.testing.assert_close(a, b_)
    weights = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    (a * weights).sum().backward()
    if b_.requires_grad:
        (b_ * weights).sum().backward()
    torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad, atol=1e-7, rtol=1e-5)


def test_equal_rewards_have_no_advantage_even_with_std():
    advantages = grpo(torch.full((2, 4), 3.0), torch.ones(2, 4, dtype=torch.bool), std=True)
    assert advantages.eq(0).all()
