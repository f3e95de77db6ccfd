"""Token losses, sums over tokens, divergences and importance weights against their equations."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.modules.objectives.losses import (
    ESTIMATORS,
    cispo,
    constant,
    entropy_loss,
    gspo,
    importance_weights,
    k1,
    k2,
    k3,
    ppo_clip,
    reinforce,
    sapo,
    sequence_mean,
    token_mean,
)
from tests.oracles import ppo_clip_oracle

seeds = st.integers(0, 2**31 - 1)
levels = pytest.mark.parametrize("level", ["token", "sequence"])

# ---- token losses


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.sampled_from([0.0, 0.3]), seeds)
def test_token_losses_are_their_equations(n, t, low, high, noise, seed):
    """Without noise the policies are equal, as in the first update of a batch."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, t, generator=generator, dtype=torch.float64) * 3
    logprobs = (old + noise * torch.randn(n, t, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, t, generator=generator) > 0.3
    every = advantages.unsqueeze(1).expand(n, t)
    zero = (0 * logprobs).sum()
    for ours, theirs in (
        (ppo_clip(logprobs, old, every, mask, clip_low=low, clip_high=high), ppo_clip_oracle(logprobs, old, advantages, mask, low, high)),
        (reinforce(logprobs, old, every, mask), -(every * logprobs)[mask].sum()),
    ):
        torch.testing.assert_close(ours.loss.sum(), theirs)
        gradients = (torch.autograd.grad(value + zero, logprobs, retain_graph=True)[0] for value in (ours.loss.sum(), theirs))
        torch.testing.assert_close(*gradients)


def test_clipped_tokens_and_divergence_are_counted():
    new = torch.tensor([[0.5, -0.5, 0.0]])
    result = ppo_clip(new, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert result.clipped.sum() == 1  # only the ratio above 1.2 is cut for a positive advantage
    torch.testing.assert_close(result.kl, new.exp() - 1 - new)
    assert reinforce(new, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)).clipped.eq(0).all()


def test_masked_positions_may_hold_anything():
    mask = torch.tensor([[True, False]])
    for loss in (ppo_clip, reinforce, gspo, cispo, sapo):
        new = torch.tensor([[0.1, torch.inf]], requires_grad=True)
        result = loss(new, torch.zeros(1, 2), torch.ones(1, 2), mask)
        result.loss.sum().backward()
        assert torch.isfinite(result.loss).all()
        assert torch.isfinite(new.grad).all()
    for mode in ("truncate", "mask"):
        weights = importance_weights(torch.tensor([[0.0, torch.inf]]), torch.zeros(1, 2), mask, 2.0, 0.5, "sequence", mode)
        assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("loss", [ppo_clip, gspo, cispo, sapo, reinforce, entropy_loss])
@pytest.mark.parametrize("ratio", [25.0, 99.0, 1e4])
def test_large_ratios_have_finite_gradients(loss, ratio):
    every = torch.ones(1, 3, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        new = torch.tensor([[-1.0, -1.0 - ratio, -1.0]], requires_grad=True)
        third = torch.full((1, 3), advantage)
        found = loss(new, new.detach() - torch.tensor([[ratio, -ratio, 0.0]]), third, every)
        values = (found,) if loss is entropy_loss else (found.loss, found.clipped, found.kl)
        assert all(torch.isfinite(value).all() for value in values)
        values[0].sum().backward()
        assert torch.isfinite(new.grad).all()


# ---- entropy


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_mean_gradient_of_the_entropy_is_exact(noise):
    """Over tokens drawn from the sampling policy, which differs from the present one by `noise`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
    old = (logits.detach() + noise * torch.randn(7, dtype=torch.float64, generator=generator)).log_softmax(0)
    policy = logits.log_softmax(0)
    entropy = -(policy.exp() * policy).sum()
    tokens, every = policy.unsqueeze(1), torch.ones(7, 1, dtype=torch.bool)
    losses = entropy_loss(tokens, old.unsqueeze(1), entropy.detach().expand(7, 1), every)
    torch.testing.assert_close(losses.detach(), -entropy.detach().expand(7, 1))
    ours, exact = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in ((old.exp().unsqueeze(1) * losses).sum(), -entropy))
    torch.testing.assert_close(ours, exact)


# ---- sums over tokens

AGGREGATIONS = {
    "token_mean": (token_mean, lambda rows: torch.cat(rows).mean()),
    "sequence_mean": (sequence_mean, lambda rows: torch.stack([row.mean() for row in rows]).mean()),
    "constant": (partial(constant, tokens=7), lambda rows: torch.stack([row.sum() / 7 for row in rows]).mean()),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=seeds)
def test_aggregations_sum_as_named(name, lengths, seed):
    aggregation, oracle = AGGREGATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, generator=generator) for length in lengths]
    weighted = sum(w * row.sum() for w, row in zip(aggregation(torch.tensor(lengths)), rows, strict=True))
    torch.testing.assert_close(weighted, oracle(rows))
    for empty in ([0, 3], [0]):
        assert torch.isfinite(aggregation(torch.tensor(empty))).all()


# ---- divergence


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_estimators_are_schulmans_formulas(logp, logref):
    p, ref = torch.tensor(logp, dtype=torch.float64), torch.tensor(logref, dtype=torch.float64)
    r = (ref - p).exp()
    for estimator, expected in ((k1, -r.log()), (k2, r.log() ** 2 / 2), (k3, (r - 1) - r.log())):
        torch.testing.assert_close(estimator(p, ref), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_estimator_means_and_gradients_over_a_distribution(seed):
    """The mean of k1 and k3 is the divergence; as losses k1 has no gradient, k2 the divergence's, k3 that of its reverse."""
    logits = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    policy, reference = logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
    divergence, reverse = (policy.exp() * (policy - reference)).sum(), (reference.exp() * (reference - policy)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), divergence)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    drawn = policy.detach().exp()  # a loss sees tokens drawn from the policy, and no gradient of the drawing
    expected = {"k1": torch.zeros_like(logits), "k2": gradient(divergence), "k3": gradient(reverse)}
    for name, estimator in ESTIMATORS.items():
        torch.testing.assert_close(gradient((drawn * estimator(policy, reference)).sum()), expected[name], msg=name)


# ---- importance weights


@levels
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), t=st.integers(1, 5), floor=st.floats(0, 0.9), cap=st.floats(1, 4), seed=seeds)
def test_importance_weights_are_bounded_ratios(level, mode, n, t, floor, cap, seed):
    generator = torch.Generator().manual_seed(seed)
    trainer = torch.randn(n, t, dtype=torch.float64, generator=generator).requires_grad_()
    engine = torch.randn(n, t, dtype=torch.float64, generator=generator)
    mask = torch.rand(n, t, generator=generator) > 0.3
    weights = importance_weights(trainer, engine, mask, cap, floor, level, mode)
    assert not weights.requires_grad
    for i in range(n):
        ratios = {s: (trainer[i, s] - engine[i, s]).exp().item() for s in range(t) if mask[i, s]}
        product = torch.tensor(list(ratios.values()), dtype=torch.float64).prod().item()
        for s in range(t):
            ratio = ratios.get(s, 0.0) if level == "token" or s not in ratios else product
            bounded = min(max(ratio, floor), cap)
            expected = 0.0 if s not in ratios or (mode == "mask" and ratio != bounded) else bounded
            assert weights[i, s].item() == pytest.approx(expected, rel=1e-5)


@levels
def test_importance_weights_correct_the_mean(level):
    """With one token, and no cap in the way: sum over engine(x) w(x) f(x) = sum over trainer(x) f(x)."""
    generator = torch.Generator().manual_seed(0)
    trainer, engine = torch.randn(2, 6, 1, dtype=torch.float64, generator=generator).log_softmax(1)
    f = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    weights = importance_weights(trainer, engine, torch.ones(6, 1, dtype=torch.bool), 1e9, 0.0, level)
    torch.testing.assert_close((engine.exp() * weights * f).sum(), (trainer.exp() * f).sum())
