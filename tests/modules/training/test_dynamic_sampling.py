import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.distributed.ranks import Ranks
from src.modules.training.dynamic_sampling import GroupBuffer, informative, shared_out
from src.modules.training.experience import Experience, concatenate
from tests.builders import small_policy, some_rollouts

POLICY = small_policy()


def experience(b: int, k: int, seed: int = 0, old: bool = True) -> Experience:
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(1, 9, (b * k,), generator=generator).tolist())
    rollouts = some_rollouts(POLICY, lengths, seed)
    shape = rollouts.input_ids.shape
    return Experience(
        rollouts,
        torch.randn(shape, generator=generator) * rollouts.rationale_mask,
        torch.rand(b, k, generator=generator) > 0.2,
        torch.randn(shape, generator=generator) if old else None,
        None,
        tuple(f"{seed}:{i}" for i in range(b)),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 2), st.integers(0, 9999))
def test_informative_groups_are_those_whose_kept_rewards_vary(b, k, min_std, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, keep = torch.randn(b, k, generator=generator, dtype=torch.float64), torch.rand(b, k, generator=generator) > 0.3
    for i, ours in enumerate(informative(rewards, keep, min_std).tolist()):
        kept = rewards[i][keep[i]]
        deviation = kept.std(correction=0).item() if len(kept) else 0.0
        assert ours == (deviation >= min_std)


def test_a_threshold_of_zero_leaves_nothing_out_and_waits_for_nothing():
    batch = experience(3, 2)
    ready = GroupBuffer(0.0, 5).add(batch, torch.zeros(3, 2))
    assert ready is not None
    assert ready.rollouts.input_ids is batch.rollouts.input_ids


def test_groups_that_do_not_vary_are_replaced_from_further_batches():
    buffer = GroupBuffer(0.1, max_extra_batches=3)
    flat, steep = [1.0, 1.0], [0.0, 1.0]
    keep_all = [experience(3, 2, seed) for seed in range(2)]
    keep_all = [Experience(**{**vars(e), "keep": torch.ones(3, 2, dtype=torch.bool)}) for e in keep_all]
    assert buffer.add(keep_all[0], torch.tensor([flat, steep, flat])) is None
    ready = buffer.add(keep_all[1], torch.tensor([steep, flat, steep]))
    assert ready is not None
    assert ready.instance_ids == ("0:1", "1:0", "1:2")
    assert buffer.held == []


def test_an_update_learns_from_no_more_groups_than_a_batch_has():
    buffer = GroupBuffer(0.1, max_extra_batches=3)
    flat, steep = [1.0, 1.0], [0.0, 1.0]
    first, second = (Experience(**{**vars(experience(3, 2, seed)), "keep": torch.ones(3, 2, dtype=torch.bool)}) for seed in range(2))
    assert buffer.add(first, torch.tensor([steep, flat, steep])) is None
    ready = buffer.add(second, torch.tensor([steep, steep, steep]))
    assert ready is not None
    assert ready.instance_ids == ("0:0", "0:2", "1:0")
    assert buffer.held == []


def test_the_bound_on_further_batches_holds_and_then_less_is_learned_from():
    buffer = GroupBuffer(0.1, max_extra_batches=1)
    batch = Experience(**{**vars(experience(2, 2)), "keep": torch.ones(2, 2, dtype=torch.bool)})
    half, none = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.ones(2, 2)
    assert buffer.add(batch, half) is None
    ready = buffer.add(batch, none)
    assert ready is not None
    assert len(ready) == 1
    assert [buffer.add(batch, none) for _ in range(4)] == [None] * 4  # two updates that had nothing to learn from
    assert GroupBuffer(0.1, max_extra_batches=0).add(batch, half).instance_ids == ("0:1",)


def test_what_is_held_survives_a_checkpoint(tmp_path):
    first = GroupBuffer(0.1, max_extra_batches=2)
    batch = Experience(**{**vars(experience(2, 3)), "keep": torch.ones(2, 3, dtype=torch.bool)})
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert first.add(batch, rewards) is None
    torch.save(first.state_dict(), tmp_path / "held.pt")
    second = GroupBuffer(0.1, max_extra_batches=2)
    second.load_state_dict(torch.load(tmp_path / "held.pt", weights_only=True))
    results = [buffer.add(batch, rewards) for buffer in (first, second)]
    assert results[0].instance_ids == results[1].instance_ids == ("0:1", "0:1")
    assert torch.equal(results[0].rollouts.input_ids, results[1].rollouts.input_ids)
    assert torch.equal(results[0].advantages, results[1].advantages)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_what_is_put_together_comes_apart_again(sizes, k, old, seed):
    parts = [experience(b, k, seed + i, old) for i, b in enumerate(sizes)]
    whole, start = concatenate(parts), 0
    assert whole.tokens == sum(part.tokens for part in parts)
    for part in parts:
        again = whole.select(torch.arange(start, start + len(part)))
        start += len(part)
        assert again.instance_ids == part.instance_ids
        width = again.rollouts.input_ids.shape[1]
        mask = part.rollouts.rationale_mask[:, :width]
        assert torch.equal(again.rollouts.rationale_mask, mask)
        assert torch.equal(again.rollouts.input_ids[mask], part.rollouts.input_ids[:, :width][mask])
        assert torch.equal(again.advantages, part.advantages[:, :width])
        assert torch.equal(again.keep, part.keep)
        assert (again.old_logprobs is None) == (not old)
        if old:
            assert torch.equal(again.old_logprobs[mask], part.old_logprobs[:, :width][mask])


def test_as_many_ranks_as_before_get_back_their_own_and_others_a_part_of_all():
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
