"""Every algorithm as its config puts it together, from rewards to gradient, against its paper's objective."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.advantages import grpo, remax, rloo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import cispo, constant, gspo, ppo_clip, reinforce, sapo
from src.modules.objectives.rewards import document, paper
from src.modules.types import Embeddings, Reward
from tests import oracles
from tests.builders import shaped
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
    ("gspo", ("algorithm.tis_cap=null",)): oracles.gspo_objective,
    ("cispo", ()): oracles.cispo_objective,
    ("sapo", ()): oracles.sapo_objective,
    ("raft", ()): oracles.raft_objective,
    ("gdpo", ()): oracles.gdpo_objective,
    ("copg", KL): partial(oracles.copg_objective, beta=0.3, constant=MAX_TOKENS),
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
        more=randn(b, k),
    )


def loss_of(algorithm: Algorithm, case: oracles.Case) -> torch.Tensor:
    """What a training step computes, without a model."""
    flat = [x.flatten(0, 1) for x in (case.logprobs, case.old, case.reference)]
    mask = torch.arange(MAX_TOKENS) < case.lengths.flatten().unsqueeze(1)
    divergence = None
    if algorithm.kl_in_reward:
        divergence = algorithm.divergence(flat[1], flat[2], mask).sum(dim=1).view_as(case.rewards)
    finished = torch.ones_like(case.lengths, dtype=torch.bool)
    terms = {"first": case.rewards, "second": case.more, "flat": torch.full_like(case.more, 0.1)}
    raw = algorithm.scores(Reward(terms, {"first": 1.0, "second": 0.5, "flat": 0.2}, case.rewards), finished)
    group = shaped(algorithm, raw, case.lengths, finished, divergence)
    greedy = (case.greedy,) if algorithm.greedy_baseline else ()
    advantages = algorithm.advantage(group.rewards, group.keep, *greedy).flatten().unsqueeze(1) * mask
    groups = torch.arange(len(case.rewards)).repeat_interleave(case.rewards.shape[1])
    tokens = algorithm.token_loss(flat[0], flat[1], advantages, mask, flat[2], groups=groups).loss
    return (tokens.sum(dim=1) * algorithm.aggregation(case.lengths.flatten())).sum()


def test_every_algorithm_has_an_oracle() -> None:
    own = {"grpo_token_credit"}  # no paper's; its parts are tested in test_credit.py
    assert {file.stem for file in (ROOT / "configs" / "algorithm").glob("*.yaml")} - own == {name for name, _ in OBJECTIVES}


@pytest.mark.parametrize(("name", "overrides"), OBJECTIVES)
def test_algorithm_is_its_papers_objective(name: str, overrides: tuple[str, ...], compose: Compose) -> None:
    cfg = compose("~experiment", "name=none", f"algorithm={name}", f"rollout.max_new_tokens={MAX_TOKENS}", *overrides)
    algorithm = instantiate(cfg.algorithm).for_engine(exact=True)

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


def test_pairs_of_two_are_ipos_loss() -> None:
    """With rewards that differ by 1/2, the gradient is that of (b / 2) (h - 1 / (2 b))^2, h the difference of log-ratios (IPO, arXiv
    2310.12036, eq. 17)."""
    case, beta = random_case(1, 2, seed=0), 0.3
    case.rewards = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    algorithm = Algorithm(rloo, reinforce, partial(constant, tokens=1), kl_coef=beta, kl_estimator="k1", kl_in="pairs")
    counted = torch.arange(MAX_TOKENS) < case.lengths.unsqueeze(2)
    ratios = ((case.logprobs - case.reference) * counted).sum(dim=2)
    ipo = beta / 2 * (ratios[0, 0] - ratios[0, 1] - 1 / (2 * beta)) ** 2
    ours, theirs = (torch.autograd.grad(loss, case.logprobs)[0] for loss in (2 * loss_of(algorithm, case), ipo))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_pairs_drawn_from_the_policy_are_the_policy_gradient(beta: float) -> None:
    """The mean over all pairs of five actions is the gradient of E[R] - b KL(pi || pi_ref); so without b it is the classic one."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), reference.log_softmax(0)
    objective = (policy.exp() * (rewards - beta * (policy - reference))).sum()
    mean = sum(policy[a].exp().detach() * policy[b].exp().detach() * pair_loss(policy, reference, rewards, a, b, beta) for a, b in PAIRS)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, -objective))
    torch.testing.assert_close(ours, theirs)


def test_pairs_of_any_policy_have_the_same_optimum() -> None:
    """At pi* = pi_ref exp(R / b) / Z no pair has a gradient, whoever drew it."""
    generator = torch.Generator().manual_seed(2)
    reference, rewards = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits = (reference + rewards / 0.4).requires_grad_()
    policy = logits.log_softmax(0)
    for a, b in PAIRS:
        (gradient,) = torch.autograd.grad(pair_loss(policy, reference.log_softmax(0), rewards, a, b, 0.4), logits, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


PAIRS = [(a, b) for a in range(5) for b in range(5)]


def pair_loss(policy: torch.Tensor, reference: torch.Tensor, rewards: torch.Tensor, a: int, b: int, beta: float) -> torch.Tensor:
    """The loss of a group of two rollouts of one token."""
    drawn, mask = [a, b], torch.ones(2, 1, dtype=torch.bool)
    algorithm = Algorithm(rloo, reinforce, partial(constant, tokens=1), kl_coef=beta, kl_estimator="k1", kl_in="pairs")
    advantages = rloo(rewards[drawn].unsqueeze(0), torch.ones(1, 2, dtype=torch.bool)).T
    own = policy[drawn].unsqueeze(1)
    loss = algorithm.token_loss(own, own.detach(), advantages, mask, reference[drawn].unsqueeze(1), groups=torch.zeros(2)).loss
    return (loss.sum(dim=1) * algorithm.aggregation(torch.ones(2))).sum()


def test_gdpo_counts_terms_without_spread_as_nothing(compose: Compose) -> None:
    algorithm = instantiate(compose("algorithm=gdpo").algorithm)
    generator = torch.Generator().manual_seed(0)
    e = Embeddings.normalised(*(torch.randn(*shape, 8, generator=generator) for shape in ((4,), (4, 3), (4, 2))))
    finished = torch.ones(4, 3, dtype=torch.bool)
    all_terms, two = paper(e), paper(e, hard_weight=0.0)
    alike = [algorithm.scores(r, finished) for r in (all_terms, replace(two, weights={**two.weights, "negative": 0.0}))]
    assert torch.equal(*alike)
    for name in ("negative", "hard"):
        assert algorithm.term_advantage(all_terms.terms[name], finished).eq(0).all()
    copies = replace(e, positive=e.positive[:, :1].expand(-1, 3, -1).clone())  # equal rollouts: rounding must not be scaled up
    assert algorithm.scores(document(copies), finished).abs().max() < 0.01
    left_out = replace(algorithm, truncation="mask")
    finished[0, 2] = False
    assert left_out.scores(all_terms, finished)[0, 2] == 0
    assert left_out.scores(all_terms, finished)[0, :2].sum().abs() < 1e-5


def test_remarks_say_what_has_no_effect() -> None:
    for loss in (gspo, cispo, partial(sapo, tau_positive=2.0)):
        (remark,) = Algorithm(grpo, loss).remarks()
        assert re.match(r"algorithm.updates_per_batch=1: .* the loss (gspo|cispo|sapo) has the gradient of ppo_clip$", remark)
        assert Algorithm(grpo, loss, updates_per_batch=2).remarks() == []
    assert Algorithm(grpo, ppo_clip).remarks() == []


@pytest.mark.parametrize("loss", [gspo, cispo, sapo, reinforce])
def test_on_policy_losses_have_one_gradient(loss: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=generator) > 0.3
    gradients = []
    for one in (loss, ppo_clip):
        own = logprobs.clone().requires_grad_()
        one(own, logprobs, advantages, mask).loss.sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


def test_correction_comes_with_the_engine() -> None:
    auto = Algorithm(grpo, ppo_clip, tis_cap="auto")
    assert auto.for_engine(exact=True).tis_cap is None
    inexact = auto.for_engine(exact=False)
    assert inexact.tis_cap == 3.0
    assert "algorithm.tis_cap=null switches this off" in inexact.remarks()[0]
    assert Algorithm(grpo, ppo_clip, tis_cap=None).for_engine(exact=False).tis_cap is None
    assert Algorithm(grpo, ppo_clip, tis_cap=2.0).for_engine(exact=True).tis_cap == 2.0


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
        ({"kl_in": "advantage"}, "kl_in='advantage': it is loss or reward or pairs"),
        ({"kl_in": "pairs"}, "kl_in=pairs compares log-ratios, .* use k1"),
        ({"kl_in": "pairs", "kl_estimator": "k1", "truncation": "mask"}, "kl_in=pairs compares all rollouts.*truncation=mask"),
        ({"entropy_coef": -1.0}, "entropy_coef=-1.0"),
        ({"tis_cap": 0.0}, "tis_cap=0.0"),
        ({"tis_cap": "engine"}, "tis_cap=engine: it must be above .* or auto"),
        ({"tis_cap": 2.0, "tis_floor": 2.5}, "tis_cap=2.0: it must be above algorithm.tis_floor=2.5"),
        ({"tis_mode": "clip"}, "tis_mode='clip': it is truncate or mask"),
        ({"term_advantage": grpo, "gae_lambda": 0.9}, "term_advantage compares .* neither"),
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
    needed = (
        ({"tis_cap": 2.0}, "tis_cap needs the engine's log-probs"),
        ({"kl_coef": 0.1}, "log-probs of the reference"),
        ({"entropy_coef": 0.1}, "needs the entropies"),
    )
    for numbers, message in needed:
        with pytest.raises(ValueError, match=message):
            Algorithm(grpo, ppo_clip, **numbers).token_loss(x, x, x, mask)
