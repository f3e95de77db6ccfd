"""The three estimators against their definitions, and against the divergence of distributions that can be summed up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.losses import ESTIMATORS, k1, k2, k3


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_they_are_schulmans_formulas(logp, logref):
    p, ref = torch.tensor(logp, dtype=torch.float64), torch.tensor(logref, dtype=torch.float64)
    r = (ref - p).exp()
    torch.testing.assert_close(k1(p, ref), -r.log(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(k2(p, ref), r.log() ** 2 / 2, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(k3(p, ref), (r - 1) - r.log(), atol=1e-9, rtol=1e-9)


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_k1_and_of_k3_is_the_divergence(seed):
    logits, reference = distributions(seed)
    policy = logits.log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), divergence)


@pytest.mark.parametrize("seed", range(3))
def test_as_losses_k1_pushes_nowhere_k2_along_the_divergence_and_k3_along_its_reverse(seed):
    logits, reference = distributions(seed)
    policy = logits.log_softmax(-1)
    drawn = policy.detach().exp()  # a loss sees tokens drawn from the policy, and no gradient of the drawing
    expected = {
        "k1": torch.zeros(7, dtype=torch.float64),
        "k2": torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0],
        "k3": torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)[0],
    }
    for name, estimator in ESTIMATORS.items():
        (gradient,) = torch.autograd.grad((drawn * estimator(policy, reference)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected[name], msg=name)
