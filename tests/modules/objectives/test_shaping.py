import pytest
import torch

from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.shaping import Penalty, soft_overlong, truncated_reward
from tests.builders import shaped
from tests.oracles import overlong_oracle

REWARDS = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 8.0], [1.0, 2.0, 3.0]])
LENGTHS = torch.ones(3, 3, dtype=torch.long)
FINISHED = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("penalty", "first", "last"),
    [
        # below the worst finished one, on the rewards' own scale; a group in which none finished stays
        ("relative", [1.0, 2.0, 1.0 - 2.0 * REWARDS[0].std(correction=0).item()], [1.0, 2.0, 3.0]),
        ("constant", [1.0, 2.0, -2.0], [-2.0, -2.0, -2.0]),
        ("mask", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0]),
        ("none", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0]),
    ],
)
def test_truncation_penalties(penalty: Penalty, first: list[float], last: list[float]) -> None:
    found = shaped(Algorithm(grpo, ppo_clip, truncation=penalty, truncation_size=2.0), REWARDS, LENGTHS, FINISHED)
    torch.testing.assert_close(found.rewards, torch.tensor([first, [0.0, 4.0, 8.0], last]))
    torch.testing.assert_close(found.penalty, found.rewards - REWARDS)
    assert found.keep.equal(FINISHED) if penalty == "mask" else found.keep.all()


def test_relative_penalty_scales_and_helps_one_finished_rollout() -> None:
    scaled = truncated_reward(REWARDS * 10, FINISHED)
    torch.testing.assert_close(scaled, truncated_reward(REWARDS, FINISHED) * 10, equal_nan=True)
    assert float(truncated_reward(torch.tensor([[1.0, 5.0, 7.0, 9.0]]), torch.tensor([[True, False, False, False]]))) < 1.0


@pytest.mark.parametrize(("max_tokens", "slope"), [(10, 0.2), (20, 0.5), (7, 1.0), (48, 0.3)])
def test_soft_overlong_is_the_papers(max_tokens: int, slope: float) -> None:
    lengths = torch.arange(1, max_tokens + 1).unsqueeze(0)
    expected = [2.0 * overlong_oracle(length, max_tokens, slope * max_tokens) for length in lengths[0].tolist()]
    torch.testing.assert_close(soft_overlong(lengths, max_tokens=max_tokens, slope=slope, size=2.0)[0], torch.tensor(expected))
    assert expected[-1] == -2.0


def test_bad_slope_or_penalty() -> None:
    for slope in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"slope={slope}"):
            soft_overlong(torch.ones(1, 2), max_tokens=8, slope=slope)
    with pytest.raises(ValueError, match="relative, constant, mask or none"):
        truncated_reward(REWARDS, FINISHED, "harsh")  # type: ignore[arg-type]


@pytest.mark.parametrize("truncation", ["constant", "relative", "mask", "none"])
def test_truncated_rollouts_pay_for_divergence_too(truncation: Penalty) -> None:
    rewards, lengths = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4, 5, 6]])
    finished, divergence = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 2.0, 20.0]])
    algorithm = Algorithm(grpo, ppo_clip, truncation=truncation, kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    plain, charged = shaped(algorithm, rewards, lengths, finished), shaped(algorithm, rewards, lengths, finished, divergence)
    torch.testing.assert_close(plain.rewards - charged.rewards, 0.1 * divergence)
    assert torch.equal(plain.penalty, charged.penalty)
    assert torch.equal(plain.keep, charged.keep)


def test_tokens_cost_what_is_said_after_a_penalty() -> None:
    lengths, finished = torch.tensor([[4, 1, 6]]), torch.tensor([[True, True, False]])
    algorithm = Algorithm(grpo, ppo_clip, truncation="constant", token_cost=0.1)
    rewards = shaped(algorithm, torch.tensor([[1.0, 1.0, 1.0]]), lengths, finished).rewards
    torch.testing.assert_close(rewards, torch.tensor([[0.6, 0.9, -1.6]]))
    assert float(algorithm.advantage(rewards, finished)[0, 1]) > 0  # of two that earn the same the shorter one


def test_negative_token_cost() -> None:
    with pytest.raises(ValueError, match=r"token_cost=-0\.1"):
        Algorithm(grpo, ppo_clip, token_cost=-0.1)
