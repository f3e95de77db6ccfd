import math

import pytest
import torch

from tests.modules.test_grace import TRIPLETS, fit, make
from tests.modules.training.test_algorithms_in_training import Inexact


@pytest.mark.parametrize("updates", [1, 5])
def test_an_engine_with_the_trainers_weights_has_no_mismatch(updates: int) -> None:
    watch = fit(make(algorithm={"updates_per_batch": updates}, learning_rate=1e-2), [TRIPLETS, TRIPLETS])
    for report in watch.reports:
        mean, largest = report.logprob_mismatch
        assert 0 <= mean <= largest < 1e-4


@pytest.mark.parametrize("tokens", [10_000, 1])
def test_the_mismatch_is_over_all_tokens_of_the_first_step(tokens: int) -> None:
    module = make(micro_batch_tokens=tokens)
    module.engine = Inexact(6)
    with torch.no_grad():
        rollouts = module.collector.collect(TRIPLETS, 0).roles["positive"].rollouts
    noise = (0.3 * torch.randn(rollouts.input_ids.shape, generator=torch.Generator().manual_seed(0))).abs()[rollouts.rationale_mask]
    mean, largest = fit(module, [TRIPLETS]).reports[0].logprob_mismatch
    assert (mean, largest) == pytest.approx((float(noise.mean()), float(noise.max())), abs=1e-4)


def test_no_step_and_no_log_probs_have_no_mismatch() -> None:
    nothing = make(algorithm={"truncation": "mask"}, max_new_tokens=1, num_generations=4, seed=2)
    assert all(math.isnan(value) for value in fit(nothing, [TRIPLETS]).reports[0].logprob_mismatch)
