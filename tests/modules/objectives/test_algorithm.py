"""Every algorithm as its config puts it together, from rewards to gradient, against its paper's objective."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.advantages import grpo, remax
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.shaping import shape
from tests import oracles
from tests.conftest import ROOT, Compose

MAX_TOKENS = 8
KL = ("algorithm.kl_coef=0.3",)

OBJECTIVES = {
    ("grpo", ()): oracles.grace_objective,
    ("grpo_std", KL): partial(oracles.grpo_objective, beta=0.3),
    ("dr_grpo", ()): partial(oracles.dr_grpo_objective, constant=MAX_TOKENS),
    ("rloo", ()): partial(oracles.rloo_objective, constant=MAX_TOKENS),
    ("remax", ()): partial(oracles.remax_objective, constant=MAX_TOKENS),
    ("reinforce_pp", KL): partial(oracles.reinforce_pp_objective, beta=0.3, baseline=False),
    ("reinforce_pp_baseline", KL): partial(oracles.reinforce_pp_objective, beta=0.3, baseline=True),
    ("dapo", ()): partial(oracles.dapo_objective, max_tokens=MAX_TOKENS),
}


def random_case(b: int, k: int, seed: int) -> oracles.Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = randn(b, k, MAX_TOKENS) - 2
    return oracles.Case(
        rewards=randn(b, k),
        greedy=randn(b),
        lengths=torch.randint(1, MAX_TOKENS + 1, (b, k), generator=generator),
        logprobs=(old + 0.3 * randn(b, k, MAX_TOKENS)).requires_grad_(),
        old=old,
        reference=old + 0.3 * randn(b, k, MAX_TOKENS),
    )


def loss_of(algorithm: Algorithm, case: oracles.Case) -> torch.Tensor:
    """What a training step computes, without a model."""
    flat = [x.flatten(0, 1) for x in (case.logprobs, case.old, case.reference)]
    mask = torch.arange(MAX_TOKENS) < case.lengths.flatten().unsqueeze(1)
    divergence = None
    if algorithm.kl_in_reward:
        divergence = algorithm.divergence(flat[1], flat[2], mask).sum(dim=1).view_as(case.rewards)
    rewards, keep = shape(algorithm, case.rewards, case.lengths, torch.ones_like(case.lengths, dtype=torch.bool), divergence)
    greedy = (case.greedy,) if algorithm.greedy_baseline else ()
    advantages = algorithm.advantage(rewards, keep, *greedy).flatten().unsqueeze(1) * mask
    tokens = algorithm.token_loss(flat[0], flat[1], advantages, mask, flat[2]).loss
    return (tokens.sum(dim=1) * algorithm.aggregation(case.lengths.flatten())).sum()


def test_every_algorithm_has_an_oracle() -> None:
    own = {"grpo_token_credit"}  # no paper's; its parts are tested in test_credit.py
    assert {file.stem for file in (ROOT / "configs" / "algorithm").glob("*.yaml")} - own == {name for name, _ in OBJECTIVES}


@pytest.mark.parametrize(("name", "overrides"), OBJECTIVES)
def test_algorithm_is_its_papers_objective(name: str, overrides: tuple[str, ...], compose: Compose) -> None:
    cfg = compose("~experiment", "name=none", f"algorithm={name}", f"rollout.max_new_tokens={MAX_TOKENS}", *overrides)
    algorithm = instantiate(cfg.algorithm)

    @settings(max_examples=15, deadline=None)
    @given(b=st.integers(1, 3), k=st.integers(2, 4), seed=st.integers(0, 2**31 - 1))
    def check(b: int, k: int, seed: int) -> None:
        case = random_case(b, k, seed)
        ours, theirs = loss_of(algorithm, case), OBJECTIVES[name, overrides](case)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-5, rtol=1e-5)
        (our_gradient,) = torch.autograd.grad(ours, case.logprobs)
        (their_gradient,) = torch.autograd.grad(theirs, case.logprobs)
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=1e-5)

    check()


def test_importance_weights_spare_the_divergence() -> None:
    numbers = {"advantage": grpo, "loss": ppo_clip, "kl_coef": 0.3}
    plain, weighted = Algorithm(**numbers), Algorithm(**numbers, tis_cap=2.0)
    old, engine = torch.full((1, 3), -1.0), torch.tensor([[-1.0, -3.0, -0.5]])
    mask, reference = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), -1.5)
    gradients = []
    for algorithm in (plain, weighted):
        logprobs = old.clone().requires_grad_()
        algorithm.token_loss(logprobs, old, torch.ones(1, 3), mask, reference, engine).loss.sum().backward()
        gradients.append(logprobs.grad)
    by_kl = 0.3 * (1 - torch.exp(torch.tensor(-0.5)))  # d k3 / d log pi = 1 - r
    torch.testing.assert_close(gradients[0], torch.full((1, 3), -1.0) + by_kl)
    torch.testing.assert_close(gradients[1], -torch.tensor([[1.0, 2.0, 2.718281828**-0.5]]) + by_kl)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"updates_per_batch": 0}, "updates_per_batch=0"),
        ({"min_group_std": -0.1}, "min_group_std=-0.1"),
        ({"max_extra_batches": -1}, "max_extra_batches=-1"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': it is k1 or k2 or k3"),
        ({"kl_in": "advantage"}, "kl_in='advantage': it is loss or reward"),
        ({"tis_cap": 0.0}, "tis_cap=0.0"),
        ({"tis_level": "batch"}, "tis_level='batch': it is token or sequence"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "k1 in the loss has a mean gradient of 0"),
        ({"gae_lambda": 1.5}, "gae_lambda=1.5"),
        ({"gae_lambda": 0.9, "greedy_baseline": True}, "set gae_lambda to null"),
        ({"advantage": remax}, "greedy_baseline=false does not go with algorithm.advantage"),
        ({"greedy_baseline": True}, "greedy_baseline=true does not go with algorithm.advantage"),
        ({"truncation": "absolute"}, "truncation='absolute': it is relative or constant or mask or none"),
    ],
)
def test_bad_settings(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Algorithm(**{"advantage": grpo, "loss": ppo_clip, **numbers})  # type: ignore[arg-type]


def test_missing_log_probs_are_named() -> None:
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for numbers, message in (({"tis_cap": 2.0}, "tis_cap needs the engine's log-probs"), ({"kl_coef": 0.1}, "log-probs of the reference")):
        with pytest.raises(ValueError, match=message):
            Algorithm(grpo, ppo_clip, **numbers).token_loss(x, x, x, mask)
