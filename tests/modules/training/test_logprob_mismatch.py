import math

import pytest
import torch

from src.modules.training.logprob_mismatch import LogprobMismatch
from tests.modules.test_grace import TRIPLETS, fit, make


def test_mean_and_largest_are_over_all_tokens_of_all_parts() -> None:
    gap = LogprobMismatch()
    assert math.isnan(gap.mean)
    assert math.isnan(gap.largest)
    gap.add(torch.tensor([[0.0, -1.0, -9.0]]), torch.tensor([[0.0, -3.0, 0.0]]), torch.tensor([[True, True, False]]))
    gap.add(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]]))
    gap.add(torch.tensor([[-1.0]]), None, torch.tensor([[True]]))
    gap.add(torch.tensor([[-1.0]]), torch.tensor([[-7.0]]), torch.tensor([[False]]))
    assert (gap.tokens, gap.mean, gap.largest) == (3, 1.0, 2.0)


@pytest.mark.parametrize("updates", [1, 5])
def test_an_engine_that_samples_with_the_trainers_weights_has_none_whatever_the_number_of_updates(updates: int) -> None:
    watch = fit(make(algorithm={"updates_per_batch": updates}, learning_rate=1e-2), [TRIPLETS, TRIPLETS])
    for report in watch.reports:
        mean, largest = report.logprob_mismatch
        assert 0 <= mean <= largest < 1e-4
