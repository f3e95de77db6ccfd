import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.training.experience import Context, Experience, concatenate, interleaving
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


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_concatenated_experience_comes_apart_again(sizes, k, old, seed):
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


def test_context_is_selected_by_instance() -> None:
    rollouts = some_rollouts(POLICY, (1, 2, 3, 4, 5, 6, 7, 8, 9))
    context = Context(rollouts, torch.arange(9.0).unsqueeze(1), torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2]))
    middle = context.select(torch.tensor([1]))
    assert middle is not None
    assert middle.gradients.flatten().tolist() == [1, 5, 6]
    assert middle.rollouts.rationale_lengths.tolist() == [2, 6, 7]
    assert context.select(torch.tensor([3])) is None


def test_interleaving_shares_roles_evenly() -> None:
    order = interleaving([4, 8])
    assert sorted(order.tolist()) == list(range(12))
    for part in order.tensor_split(4):
        assert ((part < 4).sum(), (part >= 4).sum()) == (1, 2)
    assert interleaving([5]).tolist() == [0, 1, 2, 3, 4]
