import pytest
import torch

from src.modules.objectives.shaping import penalise_truncated, soft_overlong
from tests.oracles import overlong_oracle

rewards = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 8.0], [1.0, 2.0, 3.0]])
finished = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_relative_puts_a_truncated_rollout_below_the_worst_finished_one_on_the_rewards_own_scale():
    penalised, keep = penalise_truncated(rewards, finished, "relative", size=2.0)
    assert keep.all()
    torch.testing.assert_close(penalised[0], torch.tensor([1.0, 2.0, 1.0 - 2.0 * rewards[0].std(correction=0)]))
    scaled, _ = penalise_truncated(rewards * 10, finished, "relative", size=2.0)
    torch.testing.assert_close(scaled, penalised * 10)


def test_relative_pushes_a_group_to_finish_in_which_only_one_did():
    penalised, _ = penalise_truncated(torch.tensor([[1.0, 5.0, 7.0, 9.0]]), torch.tensor([[True, False, False, False]]), "relative")
    assert (penalised[0, 1:] < 1.0).all()


def test_relative_leaves_groups_alone_in_which_all_or_none_finished():
    penalised, _ = penalise_truncated(rewards, finished, "relative")
    torch.testing.assert_close(penalised[1:], rewards[1:])


def test_constant_is_the_published_form():
    penalised, keep = penalise_truncated(rewards, finished, "constant", size=1.0)
    assert keep.all()
    assert penalised[0].tolist() == [1.0, 2.0, -1.0]
    assert penalised[2].tolist() == [-1.0] * 3


def test_mask_takes_truncated_rollouts_out():
    penalised, keep = penalise_truncated(rewards, finished, "mask")
    torch.testing.assert_close(penalised, rewards)
    assert keep.equal(finished)


def test_none_leaves_every_reward_as_it_is():
    penalised, keep = penalise_truncated(rewards, finished, "none")
    torch.testing.assert_close(penalised, rewards)
    assert keep.all()


@pytest.mark.parametrize(("max_tokens", "slope"), [(10, 0.2), (20, 0.5), (7, 1.0), (48, 0.3)])
def test_the_soft_punishment_is_the_papers(max_tokens, slope):
    lengths = torch.arange(1, max_tokens + 1).unsqueeze(0)
    expected = [2.0 * overlong_oracle(length, max_tokens, slope * max_tokens) for length in lengths[0].tolist()]
    torch.testing.assert_close(soft_overlong(lengths, max_tokens=max_tokens, slope=slope, size=2.0)[0], torch.tensor(expected))
    assert expected[-1] == -2.0


@pytest.mark.parametrize("slope", [0.0, -0.5, 1.5])
def test_a_slope_that_is_no_share_of_the_limit_is_refused(slope):
    with pytest.raises(ValueError, match=f"slope={slope}"):
        soft_overlong(torch.ones(1, 2), max_tokens=8, slope=slope)


def test_an_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match="relative, constant, mask or none"):
        penalise_truncated(rewards, finished, "harsh")  # type: ignore[arg-type]
