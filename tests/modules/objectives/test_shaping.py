import pytest
import torch

from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.shaping import Penalty, penalise_truncated, shape, soft_overlong
from tests.oracles import overlong_oracle

REWARDS = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 8.0], [1.0, 2.0, 3.0]])
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
    penalised, keep = penalise_truncated(REWARDS, FINISHED, penalty, size=2.0)
    torch.testing.assert_close(penalised, torch.tensor([first, [0.0, 4.0, 8.0], last]))
    assert keep.equal(FINISHED) if penalty == "mask" else keep.all()


def test_relative_penalty_scales_and_helps_one_finished_rollout() -> None:
    scaled, _ = penalise_truncated(REWARDS * 10, FINISHED, "relative")
    torch.testing.assert_close(scaled, penalise_truncated(REWARDS, FINISHED, "relative")[0] * 10)
    penalised, _ = penalise_truncated(torch.tensor([[1.0, 5.0, 7.0, 9.0]]), torch.tensor([[True, False, False, False]]), "relative")
    assert (penalised[0, 1:] < 1.0).all()


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
        penalise_truncated(REWARDS, FINISHED, "harsh")  # type: ignore[arg-type]


@pytest.mark.parametrize("truncation", ["constant", "relative", "mask", "none"])
def test_truncated_rollouts_pay_for_divergence_too(truncation: Penalty) -> None:
    rewards, lengths = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4, 5, 6]])
    finished, divergence = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 2.0, 20.0]])
    algorithm = Algorithm(grpo, ppo_clip, truncation=truncation, kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    plain, kept = shape(algorithm, rewards, lengths, finished)
    charged, kept_too = shape(algorithm, rewards, lengths, finished, divergence)
    torch.testing.assert_close(plain - charged, 0.1 * divergence)
    assert torch.equal(kept, kept_too)


def test_tokens_cost_what_is_said_after_a_penalty() -> None:
    lengths, finished = torch.tensor([[4, 1, 6]]), torch.tensor([[True, True, False]])
    algorithm = Algorithm(grpo, ppo_clip, truncation="constant", token_cost=0.1)
    rewards, _ = shape(algorithm, torch.tensor([[1.0, 1.0, 1.0]]), lengths, finished)
    torch.testing.assert_close(rewards, torch.tensor([[0.6, 0.9, -1.6]]))
    assert float(algorithm.advantage(rewards, finished)[0, 1]) > 0  # of two that earn the same the shorter one


def test_negative_token_cost() -> None:
    with pytest.raises(ValueError, match=r"token_cost=-0\.1"):
        Algorithm(grpo, ppo_clip, token_cost=-0.1)
