import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.policy.batching import packed_batches, padded_batches
from src.modules.types import Rollouts

lengths = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(0, 15), min_size=3, max_size=3)), min_size=1, max_size=5)


def rollouts_of(instances: list[tuple[int, list[int]]]) -> Rollouts:
    """Three rollouts to an instance, given as (prompt length, rationale lengths)."""
    prompts = torch.tensor([prompt for prompt, own in instances for _ in own])
    lengths = prompts + torch.tensor([length for _, own in instances for length in own])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    return Rollouts(ids, torch.zeros_like(prompts), prompts, lengths, torch.ones_like(prompts, dtype=torch.bool))


def tokens_of(rollouts: Rollouts, part: torch.Tensor) -> int:
    leads = [int(rows[0]) for rows in (part[part // 3 == instance] for instance in (part // 3).unique())]
    return int(rollouts.rationale_lengths[part].sum() + rollouts.prompt_lengths[leads].sum())


@given(instances=lengths, budget=st.integers(1, 120), data=st.data())
def test_packed_batches_keep_the_budget(instances, budget, data):
    rollouts = rollouts_of(instances)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(rollouts) - 1), min_size=1))))
    parts = list(packed_batches(rollouts, rows, 3, budget))
    assert torch.equal(torch.cat(parts), rows)
    for part in parts:
        assert tokens_of(rollouts, part) <= budget or len(part) == 1
    for instance in (rows // 3).unique():
        members = rows[rows // 3 == instance]
        if tokens_of(rollouts, members) <= budget:  # fits: its prompt is computed once
            assert sum(bool((part // 3 == instance).any()) for part in parts) == 1


def test_no_rows_make_no_batch():
    assert list(packed_batches(rollouts_of([(4, [1, 2, 3])]), torch.zeros(0, dtype=torch.long), 3, 10)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=30), st.integers(1, 120), st.booleans())
def test_padded_batches_keep_the_budget(sizes: list[tuple[int, int]], tokens: int, alike: bool) -> None:
    lengths = [length for length, _ in sizes]
    extra = [sizes[0][1] if alike else own for _, own in sizes]
    parts = [part.tolist() for part in padded_batches(torch.tensor(lengths), tokens, torch.tensor(extra))]
    rows = [row for part in parts for row in part]
    order = [lengths[row] for row in rows]
    assert order == sorted(order, reverse=True)  # texts of like lengths together
    assert sorted(rows) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) + sum(extra[row] for row in part) <= tokens
    greedy, start = 0, 0
    while start < len(order):
        fits = [n for n in range(1, len(order) - start + 1) if n * order[start] + sum(extra[r] for r in rows[start : start + n]) <= tokens]
        greedy, start = greedy + 1, start + max(fits, default=1)
    assert len(parts) == greedy  # even parts are no more parts


@pytest.mark.parametrize(("rows", "fitting", "sizes"), [(16, 15, [8, 8]), (16, 16, [16]), (7, 3, [3, 2, 2]), (33, 16, [11, 11, 11])])
def test_padded_batches_are_even(rows: int, fitting: int, sizes: list[int]) -> None:
    assert [len(part) for part in padded_batches(torch.full((rows,), 10), 10 * fitting)] == sizes
