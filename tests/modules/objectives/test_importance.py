import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.losses import truncated_importance_weights


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.5, 4), st.sampled_from(["token", "sequence"]), st.integers(0, 9999))
def test_weights_are_capped_ratios_without_gradient(n, t, cap, level, seed):
    generator = torch.Generator().manual_seed(seed)
    trainer = torch.randn(n, t, dtype=torch.float64, generator=generator).requires_grad_()
    engine = torch.randn(n, t, dtype=torch.float64, generator=generator)
    mask = torch.rand(n, t, generator=generator) > 0.3
    weights = truncated_importance_weights(trainer, engine, mask, cap, level)
    assert not weights.requires_grad
    for i in range(n):
        ratios = [(trainer[i, s] - engine[i, s]).exp().item() for s in range(t) if mask[i, s]]
        whole = torch.tensor(ratios).prod().item()
        for s in range(t):
            ratio = (trainer[i, s] - engine[i, s]).exp().item() if level == "token" else whole
            expected = min(ratio, cap) if mask[i, s] else 0.0
            assert weights[i, s].item() == pytest.approx(expected, rel=1e-5)


def test_an_exact_engine_weighs_nothing():
    logprobs, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for level in ("token", "sequence"):
        assert truncated_importance_weights(logprobs, logprobs, mask, 1.0, level).eq(1).all()


def test_masked_positions_may_hold_anything():
    mask = torch.tensor([[True, False]])
    weights = truncated_importance_weights(torch.tensor([[0.0, torch.inf]]), torch.zeros(1, 2), mask, 2.0, "sequence")
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weighted_gradients_of_the_engines_samples_have_the_mean_of_the_trainers(level):
    """With one token, and no cap in the way: sum over engine(x) w(x) f(x) = sum over trainer(x) f(x)."""
    generator = torch.Generator().manual_seed(0)
    trainer, engine = torch.randn(2, 6, 1, dtype=torch.float64, generator=generator).log_softmax(1)
    f = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    weights = truncated_importance_weights(trainer, engine, torch.ones(6, 1, dtype=torch.bool), 1e9, level)
    torch.testing.assert_close((engine.exp() * weights * f).sum(), (trainer.exp() * f).sum())
