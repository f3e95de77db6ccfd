"""Whose rows are whose; what needs several processes is in tests/test_distributed.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.modules.distributed.ranks import ALONE, Ranks


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_shares_and_rows_add_up(count: int, instances: int, each: int) -> None:
    batch = list(range(count * instances))
    rows = torch.arange(count * instances * each)
    ranks = [Ranks(rank, count) for rank in range(count)]
    assert sorted(i for r in ranks for i in r.share(batch)) == batch
    for r in ranks:
        expected = [i * each + m for i in r.share(batch) for m in range(each)]  # rows of an instance stay side by side
        assert r.own(rows, instances).tolist() == expected


def test_minibatches_of_shares_add_up() -> None:
    batch = list(range(24))
    whole = [set(batch[i : i + 6]) for i in range(0, 24, 6)]
    parts = [[Ranks(rank, 3).share(batch)[i : i + 2] for i in range(0, 8, 2)] for rank in range(3)]
    assert [set().union(*minibatch) for minibatch in zip(*parts, strict=True)] == whole


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="a batch of 5 instances cannot be shared out evenly over 2 processes"):
        Ranks(0, 2).share([1, 2, 3, 4, 5])


def test_one_process_changes_nothing() -> None:
    rows = torch.randn(6, 2)
    assert ALONE.gather(rows, 3) is rows
    assert ALONE.gather_uneven(rows[:, 0])[1] == slice(0, 6)
    assert ALONE.total(1.5, 2) == [1.5, 2]
    assert ALONE.objects("a") == ["a"]
