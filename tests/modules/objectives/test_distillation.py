import math

import pytest
import torch
from torch.nn.functional import normalize

from src.modules.objectives.distillation import LOSSES, distillation_gradients, similarity
from src.modules.types import Embeddings


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_similarity_against_a_loop() -> None:
    plain, target = units(5, 3), units(5, 3, seed=1)
    found = similarity(plain, target, temperature=0.2)
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p, q = ([math.exp(float(x[i] @ x[j]) / 0.2) for j in others] for x in (target, plain))
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        assert float(found[i]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_at_the_target(loss: str) -> None:
    target = units(6, 8)
    plain = {"query": target[:2], "positive": target[2:4], "negative": target[4:]}
    embeddings = Embeddings(target[:2], target[2:4].unsqueeze(1).repeat(1, 3, 1), target[4:].unsqueeze(1))
    found, gradients = distillation_gradients(plain, embeddings, loss)
    assert found == pytest.approx(0.0, abs=1e-5)
    if loss == "similarity":  # that of a cosine in a unit vector is the target, whose part along the vector moves nothing
        assert all(float(gradient.abs().max()) < 1e-4 for gradient in gradients.values())


def test_similarity_of_two_texts_is_nothing() -> None:
    assert similarity(units(2, 4), units(2, 4, seed=1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", LOSSES)
def test_derivative_is_of_minus_b_times_the_mean(loss: str) -> None:
    plain, e = (
        {"positive": units(2, 4), "query": units(2, 4, seed=1)},
        Embeddings(units(2, 4, seed=2), units(2, 3, 4, seed=3), units(2, 0, 4)),
    )
    _, gradients = distillation_gradients(plain, e, loss)
    step = 1e-2 * torch.randn(2, 4, generator=torch.Generator().manual_seed(5))
    after, _ = distillation_gradients({**plain, "query": plain["query"] + step}, e, loss)
    lower, _ = distillation_gradients({**plain, "query": plain["query"] - step}, e, loss)
    assert float((gradients["query"] * step).sum()) == pytest.approx(-2 * (after - lower) / 2, rel=2e-2, abs=1e-5)
