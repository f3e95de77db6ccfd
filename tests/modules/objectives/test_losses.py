import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.losses import ppo_clip, reinforce
from tests.oracles import ppo_clip_oracle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 2**31 - 1))
def test_ppo_clip_is_the_equation_forward_and_backward(n, t, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, t, generator=generator, dtype=torch.float64) * 3
    ours = (old + 0.3 * torch.randn(n, t, generator=generator, dtype=torch.float64)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, t, generator=generator) > 0.3
    a = ppo_clip(ours, old, advantages.unsqueeze(1).expand(n, t), mask, clip_low=low, clip_high=high).loss.sum()
    b = ppo_clip_oracle(theirs, old, advantages, mask, low, high)
    torch.testing.assert_close(a, b)
    a.backward()
    if b.requires_grad:
        b.backward()
    torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_on_policy_both_losses_have_the_gradient_of_the_policy_gradient(n, t, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(n, t, dtype=torch.float64, generator=generator).requires_grad_()
    advantages = torch.randn(n, t, dtype=torch.float64, generator=generator)
    mask = torch.rand(n, t, generator=generator) > 0.2
    for loss in (ppo_clip, reinforce):
        (gradient,) = torch.autograd.grad(loss(logprobs, logprobs.detach(), advantages, mask).loss.sum(), logprobs)
        torch.testing.assert_close(gradient, -(advantages * mask))


def test_reinforce_is_minus_advantage_times_log_probability():
    logprobs, mask = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[True, True], [True, False]])
    result = reinforce(logprobs, torch.zeros(2, 2), torch.tensor([[2.0, 2.0], [-1.0, -1.0]]), mask)
    assert result.loss.tolist() == [[2.0, 4.0], [-3.0, 0.0]]
    assert result.clipped.eq(0).all()


def test_what_was_clipped_and_how_far_it_went_are_counted():
    old = torch.zeros(1, 3)
    new = torch.tensor([[0.5, -0.5, 0.0]])
    result = ppo_clip(new, old, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert result.clipped.sum() == 1  # only the ratio above 1.2 is cut for a positive advantage
    expected = sum(r - 1 - torch.log(torch.tensor(r)).item() for r in (2.718281828**0.5, 2.718281828**-0.5))
    assert abs(result.kl.sum().item() - expected) < 1e-5


def test_masked_positions_may_hold_anything():
    old = torch.zeros(1, 2)
    for loss in (ppo_clip, reinforce):
        new = torch.tensor([[0.1, torch.inf]], requires_grad=True)
        result = loss(new, old, torch.ones(1, 2), torch.tensor([[True, False]]))
        result.loss.sum().backward()
        assert torch.isfinite(result.loss).all()
        assert torch.isfinite(new.grad).all()
