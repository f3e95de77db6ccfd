"""Values at which rounding or overflow used to decide."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from src.modules.objectives.advantages import grpo, reinforce_pp, reinforce_pp_baseline, remax, rloo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.credit import token_advantages
from src.modules.objectives.losses import k3, ppo_clip
from src.modules.objectives.shaping import shape_rewards, soft_overlong
from src.modules.types import GreedyRollouts, RoleRollouts, Rollouts
from tests.builders import shaped


@pytest.mark.parametrize("k", [3, 7, 8])
@pytest.mark.parametrize("advantage", [partial(grpo, std=True), grpo, rloo, reinforce_pp, reinforce_pp_baseline])
def test_equal_rewards_have_no_advantage(advantage: Any, k: int) -> None:
    keep = torch.ones(3, k, dtype=torch.bool)
    keep[1, 0] = False
    for reward in torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist():
        rewards = torch.full((3, k), reward)
        rewards[1, 0] = 5.0  # left out
        rewards[2, 1] = torch.nextafter(rewards[2, 1], torch.tensor(torch.inf))  # differs by a rounding
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


def group_of(rewards: list[float], lengths: list[int], finished: list[bool]) -> tuple[RoleRollouts, torch.Tensor]:
    """One group whose prefix rewards rise evenly to the rewards."""
    n, longest = len(rewards), max(lengths)
    ends = torch.tensor(lengths)
    rollouts = Rollouts(torch.zeros(n, longest + 1, dtype=torch.long), ends * 0, ends * 0 + 1, ends + 1, torch.tensor(finished))
    shares = torch.arange(longest + 1).minimum(ends.unsqueeze(1)) / ends.unsqueeze(1)
    prefixes = (shares * torch.tensor(rewards).unsqueeze(1)).view(1, n, longest + 1, 1)
    return RoleRollouts(rollouts, ("a",), prefixes[:, :, -1], ends[None], torch.tensor([finished]), prefixes=prefixes), torch.tensor(
        [rewards]
    )


@pytest.mark.parametrize("gae_lambda", [0.5, 0.95, 1.0])
def test_a_penalty_acts_on_the_longest_rationale_under_token_credit(gae_lambda: float) -> None:
    group, raw = group_of([1.0, 0.5, 0.2, 0.1][::-1], [40, 60, 80, 200], [True, True, True, False])
    sums = []
    for truncation in ("none", "constant"):
        algorithm = Algorithm(grpo, ppo_clip, truncation=truncation, gae_lambda=gae_lambda)  # type: ignore[arg-type]
        shaped = shape_rewards(algorithm, raw, group, lambda own: own.squeeze(2))
        sums.append(token_advantages(algorithm, shaped, group, lambda own: own.squeeze(2))[0, -1].sum())
    # 2 of reward: 1.5 below the group at 40 tokens, 4/3 at 20, 1 at 20
    assert sums[0] - sums[1] == pytest.approx(40 * 1.5 + 20 * 4 / 3 + 20 * 1.0, rel=1e-4)


def test_a_greedy_rollout_has_no_part_in_its_groups_penalty() -> None:
    group, raw = group_of([1.0, 0.5, 0.2], [4, 4, 4], [True, True, False])
    greedy = GreedyRollouts(torch.full((1, 1, 1), -5.0), torch.tensor([[4]]), torch.tensor([[True]]))
    plain, beside = (
        shape_rewards(
            Algorithm(advantage, ppo_clip, greedy_baseline=given is not None), raw, replace(group, greedy=given), lambda own: own.squeeze(2)
        )
        for given, advantage in ((None, grpo), (greedy, remax))
    )
    torch.testing.assert_close(plain.rewards, beside.rewards)
    assert beside.baseline is not None
    assert beside.baseline.tolist() == [-5.0]


@pytest.mark.parametrize(("truncation", "expected"), [("none", 0.0), ("constant", -2.0), ("relative", None)])
def test_the_overlong_slope_adds_to_the_penalty(truncation: Any, expected: float | None) -> None:
    rewards, lengths, finished = torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[2, 5, 10]]), torch.tensor([[True, True, False]])
    overlong = partial(soft_overlong, max_tokens=10, slope=0.5, size=1.0)
    with_slope, without = (
        shaped(Algorithm(grpo, ppo_clip, truncation=truncation, overlong=given), rewards, lengths, finished).rewards
        for given in (overlong, None)
    )
    torch.testing.assert_close(with_slope - without, torch.tensor([[0.0, 0.0, -1.0]]))
    if expected is not None:
        assert float(with_slope[0, 2]) == expected
