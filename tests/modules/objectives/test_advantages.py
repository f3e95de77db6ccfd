from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.advantages import best_of_group, grpo, reinforce_pp, reinforce_pp_baseline, remax, rloo
from tests import oracles

BASELINE = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)

PAIRS = {
    "grpo": (grpo, partial(oracles.grpo_oracle, std=False)),
    "grpo_std": (partial(grpo, std=True), partial(oracles.grpo_oracle, std=True)),
    "rloo": (rloo, oracles.rloo_oracle),
    "remax": (lambda r, keep: remax(r, keep, BASELINE[: len(r)]), lambda r, keep: oracles.remax_oracle(r, keep, BASELINE)),
    "reinforce_pp": (reinforce_pp, oracles.reinforce_pp_oracle),
    "reinforce_pp_baseline": (reinforce_pp_baseline, oracles.reinforce_pp_baseline_oracle),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 5), k=st.integers(1, 6), masked=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_advantage_is_the_papers_equation(name, b, k, masked, seed):
    fast, slow = PAIRS[name]
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(b, k, generator=generator, dtype=torch.float64).requires_grad_()
    keep = torch.rand(b, k, generator=generator) > 0.3 if masked else torch.ones(b, k, dtype=torch.bool)
    zero = (0 * rewards).sum()
    a, b_ = fast(rewards, keep), slow(rewards, keep) + zero
    torch.testing.assert_close(a, b_)
    upstream = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad((values * upstream).sum(), rewards)[0].nan_to_num() for values in (a, b_))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "remax"])
def test_equal_or_left_out_rewards_change_nothing(name):
    advantage = PAIRS[name][0]
    assert advantage(torch.full((2, 4), 3.0), torch.ones(2, 4, dtype=torch.bool)).eq(0).all()
    rewards, keep = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    keep[1, 2] = False
    other = rewards.clone()
    other[1, 2] = 1e6
    torch.testing.assert_close(advantage(rewards, keep), advantage(other, keep))
    assert advantage(other, keep)[1, 2] == 0


def test_best_of_group_is_one_that_is_kept():
    rewards, keep = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [4.0, 2.0, 9.0]]), torch.ones(4, 3, dtype=torch.bool)
    keep[1, 1] = keep[3, 1] = keep[3, 2] = False
    assert best_of_group(rewards, keep).tolist() == [[0, 3, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]]


def test_rloo_is_scaled_grpo():
    rewards, keep = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(rloo(rewards, keep), grpo(rewards, keep) * 4 / 3)


def test_reinforce_pp_baseline_keeps_flat_groups_small():
    rewards = torch.tensor([[0.0, 1e-3], [0.0, 1.0]])
    keep = torch.ones(2, 2, dtype=torch.bool)
    ours, theirs = reinforce_pp_baseline(rewards, keep).abs(), grpo(rewards, keep, std=True).abs()
    assert ours[0, 0] < ours[1, 0] / 100
    torch.testing.assert_close(theirs[0], theirs[1], rtol=1e-2, atol=0)
