"""Values at which rounding or overflow used to decide."""

from functools import partial
from typing import Any

import pytest
import torch

from src.modules.objectives.advantages import grpo, reinforce_pp, reinforce_pp_baseline, rloo
from src.modules.objectives.losses import k3


@pytest.mark.parametrize("k", [3, 7, 8])
@pytest.mark.parametrize("advantage", [partial(grpo, std=True), grpo, rloo, reinforce_pp, reinforce_pp_baseline])
def test_equal_rewards_have_no_advantage(advantage: Any, k: int) -> None:
    keep = torch.ones(3, k, dtype=torch.bool)
    keep[1, 0] = False
    for reward in torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist():
        rewards = torch.full((3, k), reward)
        rewards[1, 0] = 5.0  # left out
        assert advantage(rewards, keep).eq(0).all()


@pytest.mark.parametrize("distance", [59.0, 99.0, 1e4])
def test_k3_is_bounded(distance: float) -> None:
    logprobs = torch.tensor([-distance, 0.0], requires_grad=True)
    values = k3(logprobs, torch.tensor([0.0, -distance]))
    values.sum().backward()
    assert values.detach().isfinite().all()
    assert values.max() < 5e8  # exp(20)
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
