"""Distillation into plain embeddings in a training step against plain autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.grace import GRACE
from src.modules.objectives.distillation import cosine, similarity
from src.modules.objectives.rewards import listwise
from src.modules.types import ROLES
from tests.builders import TRIPLETS, fit, make, off
from tests.oracles import flat, plain_vectors, step_gradients, trained

BATCH = TRIPLETS[:4]
ALONE = {"score_function_weight": 0.0, "pathwise_weight": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "similarity": {},
    "cosine": {"distill_loss": "cosine"},
    "last token": {"pooling": "eos"},
    "inner layer": {"layer": -2},
    "with both parts": {"score_function_weight": 1.0, "pathwise_weight": 0.7},
    "all learned from": {"score_function_weight": 1.0, "also_learn_from": ["query", "negative"]},
    "adapters": {"lora": True},
}


def built(**settings: Any) -> GRACE:
    own = {"distill_weight": 2.0, "gradient_parts_every_n_rollout_batches": 0, "algorithm": {"truncation": "none"}}
    return make(listwise, **{**own, **ALONE, "max_new_tokens": 5, **settings})


def distilled_gradient(module: GRACE) -> Tensor:
    """The gradient of the weighted loss by one graph over all texts, with the targets as they were sampled."""
    with torch.no_grad():
        batch = module.collector.collect(BATCH, 0)
    e = batch.embeddings
    targets = torch.cat([normalize(e.positive.mean(dim=1), dim=-1), e.query, e.negative.flatten(0, 1)])
    plain = torch.cat([plain_vectors(module, BATCH, role) for role in ROLES])
    loss = {"similarity": similarity, "cosine": cosine}[module.hparams["distill_loss"]](plain, targets)
    parameters = trained(module.policy)
    gradients = torch.autograd.grad(module.hparams["distill_weight"] * loss.mean(), parameters, allow_unused=True)
    return flat(parameters, gradients)


@pytest.mark.parametrize("name", SETTINGS)
def test_step_gradient_is_that_of_one_graph(name: str) -> None:
    expected = distilled_gradient(built(**SETTINGS[name]))
    assert float(expected.norm()) > 1e-3
    if SETTINGS[name].get("score_function_weight"):
        expected = expected + sum(step_gradients(built(**SETTINGS[name]), BATCH))
    for tokens in (10_000, 1):
        seen = fit(built(**SETTINGS[name], micro_batch_tokens=tokens), [BATCH])
        assert off(seen.gradients[0], expected) < 1e-4


def test_plain_embeddings_come_near() -> None:
    reports = fit(built(learning_rate=1e-3, distill_loss="cosine"), [BATCH] * 12).reports
    losses = [report.update["distill_loss"] for report in reports]
    assert losses[-1] < losses[0] / 2


def test_nothing_is_embedded_without_a_weight() -> None:
    module = built(distill_weight=0.0, score_function_weight=1.0)
    with torch.no_grad():
        assert module.collector.collect(BATCH, 0).plain == {}
    assert "distill_loss" not in fit(module, [BATCH]).reports[0].update
