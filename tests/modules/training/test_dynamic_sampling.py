from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.distributed.ranks import Ranks
from src.modules.training.dynamic_sampling import GroupBuffer, informative, shared_out
from src.modules.training.experience import Experience
from tests.modules.training.test_experience import experience


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 2), st.integers(0, 9999))
def test_informative_groups_vary(b, k, min_std, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, keep = torch.randn(b, k, generator=generator, dtype=torch.float64), torch.rand(b, k, generator=generator) > 0.3
    for i, ours in enumerate(informative(rewards, keep, min_std).tolist()):
        kept = rewards[i][keep[i]]
        deviation = kept.std(correction=0).item() if len(kept) else 0.0
        assert ours == (deviation >= min_std)


def test_zero_threshold_waits_for_nothing():
    batch = experience(3, 2)
    ready = GroupBuffer(0.0, 5).add(batch, torch.zeros(3, 2))
    assert ready is not None
    assert ready.rollouts.input_ids is batch.rollouts.input_ids


FLAT, STEEP = [1.0, 1.0], [0.0, 1.0]


def kept(b: int, k: int, seed: int = 0) -> Experience:
    """Of which every rollout counts."""
    return replace(experience(b, k, seed), keep=torch.ones(b, k, dtype=torch.bool))


@pytest.mark.parametrize(
    ("second", "ids"),
    [([STEEP, FLAT, STEEP], ("0:1", "1:0", "1:2")), ([STEEP, STEEP, STEEP], ("0:1", "1:0", "1:1"))],  # no more than a batch has
)
def test_flat_groups_are_replaced_from_further_batches(second, ids):
    buffer = GroupBuffer(0.1, max_extra_batches=3)
    assert buffer.add(kept(3, 2, 0), torch.tensor([FLAT, STEEP, FLAT])) is None
    ready = buffer.add(kept(3, 2, 1), torch.tensor(second))
    assert ready is not None
    assert ready.instance_ids == ids
    assert buffer.held == []


def test_bound_on_further_batches():
    buffer, batch = GroupBuffer(0.1, max_extra_batches=1), kept(2, 2)
    half, none = torch.tensor([FLAT, STEEP]), torch.tensor([FLAT, FLAT])
    assert buffer.add(batch, half) is None
    ready = buffer.add(batch, none)
    assert ready is not None
    assert len(ready) == 1
    assert [buffer.add(batch, none) for _ in range(4)] == [None] * 4  # two updates that had nothing to learn from
    assert GroupBuffer(0.1, max_extra_batches=0).add(batch, half).instance_ids == ("0:1",)


def test_held_groups_survive_a_checkpoint(tmp_path):
    first, second = (GroupBuffer(0.1, max_extra_batches=2) for _ in range(2))
    batch, rewards = kept(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert first.add(batch, rewards) is None
    torch.save(first.state_dict(), tmp_path / "held.pt")
    second.load_state_dict(torch.load(tmp_path / "held.pt", weights_only=True))
    results = [buffer.add(batch, rewards) for buffer in (first, second)]
    assert results[0].instance_ids == results[1].instance_ids == ("0:1", "0:1")
    assert torch.equal(results[0].rollouts.input_ids, results[1].rollouts.input_ids)
    assert torch.equal(results[0].advantages, results[1].advantages)


def test_held_groups_are_shared_over_ranks():
    parts = [experience(1, 2, seed) for seed in range(5)]
    states = [{"held": parts[:3], "batches": 2}, {"held": parts[3:], "batches": 2}]  # the second rank's first batch left nothing
    assert [shared_out(states, Ranks(rank, 2)) for rank in range(2)] == states
    three = [shared_out(states, Ranks(rank, 3))["held"] for rank in range(3)]
    assert sorted(part.instance_ids for held in three for part in held) == sorted(part.instance_ids for part in parts)
    assert shared_out(states, Ranks())["held"] == parts


def test_groups_are_not_restored_without_dynamic_sampling():
    buffer, off = GroupBuffer(0.1, max_extra_batches=3), GroupBuffer(0.0)
    buffer.add(experience(2, 2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert len(buffer.state_dict()["held"]) == 1
    off.load_state_dict(buffer.state_dict())
    assert off.held == []
