from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.objectives.advantages import grpo, rloo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.credit import at_tokens, compare_by_position, from_tokens, prefix_rewards, token_advantages, token_returns
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import document, listwise, paper
from src.modules.objectives.roles import role_reward
from src.modules.objectives.shaping import shape_rewards
from src.modules.types import Embeddings, RoleRollouts, Rollouts

shapes = st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31 - 1))


def drawn(b: int, k: int, r: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(b, k, r + 1, generator=generator, dtype=torch.float64)
    return rewards, torch.randint(1, r + 1, (b, k), generator=generator)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0, 1), st.floats(-2, 2))
def test_returns_are_decayed_sums_of_gains(shape, decay, at_end):
    rewards, lengths = drawn(*shape)
    returns = token_returns(rewards, torch.full(lengths.shape, at_end, dtype=torch.float64), lengths, decay)
    for b in range(rewards.shape[0]):
        for k in range(rewards.shape[1]):
            n = int(lengths[b, k])
            value = rewards[b, k, : n + 1].tolist()
            value[n] += at_end
            for t in range(rewards.shape[2] - 1):
                wanted = sum(decay ** (s - t) * (value[s + 1] - value[s]) for s in range(t, n))
                assert returns[b, k, t].item() == pytest.approx(wanted, abs=1e-9)


def test_undecayed_gradient_has_the_plain_mean():
    # two tokens of a vocabulary of three; every rationale with its probability, so that the means are exact
    logits = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(dim=1)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, generator=generator, dtype=torch.float64)  # the reward after one token
    last = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    plain = shaped = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            probability = (logprobs[0, a] + logprobs[1, b]).exp().detach()
            rewards = torch.stack([torch.zeros((), dtype=torch.float64), first[a], last[a, b]]).view(1, 1, 3)
            returns = token_returns(rewards, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[2]]), 1.0)[0, 0]
            plain = plain + probability * last[a, b] * (logprobs[0, a] + logprobs[1, b])
            shaped = shaped + probability * (returns[0] * logprobs[0, a] + returns[1] * logprobs[1, b])
    torch.testing.assert_close(torch.autograd.grad(shaped, logits, retain_graph=True), torch.autograd.grad(plain, logits))


@pytest.mark.parametrize("reward", [listwise, document, paper])
def test_prefix_rewards_are_rewards_of_cut_rollouts(reward):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 4, 6, 8, generator=generator)
    prefixes = torch.nn.functional.normalize(raw, dim=-1)
    query, negative = torch.randn(3, 8, generator=generator), torch.randn(3, 1, 8, generator=generator)
    e = Embeddings.normalised(query, raw[:, :, -1], negative)
    values = prefix_rewards(role_reward(reward, e, "positive"), prefixes)
    assert values.shape == (3, 4, 6)
    torch.testing.assert_close(values[:, :, -1], reward(e).total)
    middle = reward(Embeddings(e.query, prefixes[:, :, 2], e.negative)).total
    torch.testing.assert_close(values[:, :, 2], middle)


def test_positions_compare_rollouts_that_reach_them():
    returns = torch.tensor([[[1.0, 5.0, 2.0], [3.0, 0.0, 0.0], [5.0, 1.0, 0.0]]])
    lengths = torch.tensor([[3, 1, 2]])
    everyone = torch.ones(1, 3, dtype=torch.bool)
    got = compare_by_position(partial(grpo, std=False), returns, lengths, everyone)
    # position 0: mean 3; position 1: the first and third, mean 3; position 2: one rollout has nothing to compare with
    torch.testing.assert_close(got, torch.tensor([[[-2.0, 2.0, 0.0], [0.0, 0.0, 0.0], [2.0, -2.0, 0.0]]]))
    without_third = compare_by_position(partial(grpo, std=False), returns, lengths, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(without_third, torch.tensor([[[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]))


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_baselines_are_those_of_the_others(shape):
    rewards, lengths = drawn(*shape)
    returns = token_returns(rewards, torch.zeros(lengths.shape, dtype=torch.float64), lengths, 0.9)
    got = compare_by_position(rloo, returns, lengths, torch.ones_like(lengths, dtype=torch.bool))
    for b, own in enumerate(lengths.tolist()):
        for i, t in ((i, t) for i, length in enumerate(own) for t in range(length)):
            others = [returns[b, j, t].item() for j, length in enumerate(own) if j != i and length > t]
            wanted = returns[b, i, t].item() - sum(others) / len(others) if others else 0.0
            assert got[b, i, t].item() == pytest.approx(wanted, abs=1e-9)


def test_the_default_credit_does_not_weigh_late_tokens_less(compose):
    algorithm = instantiate(compose("algorithm=grpo_token_credit").algorithm)
    returns = torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]])
    got = compare_by_position(algorithm.advantage, returns, torch.tensor([[2, 2, 1, 1]]), torch.ones(1, 4, dtype=torch.bool))
    # 1 less the mean of -1, 1 and -1; 1 less -1: by a mean over all it would be 1 at both
    torch.testing.assert_close(got[0, 0], torch.tensor([4 / 3, 2.0]))


def rollouts_of(prompts: list[int], lengths: list[int], finished: bool = True) -> Rollouts:
    """Ids of zero, with prompts and rationales of these lengths."""
    ends = torch.tensor(prompts) + torch.tensor(lengths)
    n, width = len(prompts), int(ends.max())
    starts = torch.ones(n, dtype=torch.long)
    return Rollouts(torch.zeros(n, width, dtype=torch.long), starts, torch.tensor(prompts), ends, torch.full((n,), finished))


def test_values_go_to_their_tokens():
    placed = at_tokens(torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]), rollouts_of([2, 3], [3, 1]))
    torch.testing.assert_close(placed, torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 4.0, 0.0]]))


@pytest.mark.parametrize("reward", [listwise, document, paper])
def test_first_token_return_is_the_gain(reward):
    generator = torch.Generator().manual_seed(1)
    b, k, r = 3, 4, 6
    lengths = torch.randint(1, r + 1, (b, k), generator=generator)
    whole = torch.randn(b, k, r + 1, 8, generator=generator)
    own = torch.arange(r + 1).minimum(lengths.unsqueeze(2))
    prefixes = torch.nn.functional.normalize(whole.gather(2, own.unsqueeze(3).expand_as(whole)), dim=-1)
    e = Embeddings.normalised(torch.randn(b, 8, generator=generator), prefixes[:, :, -1], torch.randn(b, 1, 8, generator=generator))
    rollouts = rollouts_of([2] * (b * k), lengths.flatten().tolist())
    everyone = torch.ones(b, k, dtype=torch.bool)
    group = RoleRollouts(rollouts, ("a", "b", "c"), e.positive, lengths, everyone, prefixes=prefixes)
    algorithm = Algorithm(advantage=lambda rewards, keep: rewards, loss=ppo_clip, truncation="none", gae_lambda=1.0)
    value = role_reward(reward, e, "positive")
    shaped = shape_rewards(algorithm, reward(e).total, group, value)
    first = token_advantages(algorithm, shaped, group, value)[:, :, 0]  # the first token's return
    start = reward(Embeddings(e.query, prefixes[:, :, 0], e.negative)).total
    torch.testing.assert_close(first, reward(e).total - start)


def test_divergence_is_charged_by_token() -> None:
    generator = torch.Generator().manual_seed(2)
    b, k, r, decay = 2, 3, 4, 0.5
    lengths = torch.tensor([[4, 2, 3], [1, 4, 4]])
    prompts = [2, 3, 2, 4, 2, 3]
    rollouts = rollouts_of(prompts, lengths.flatten().tolist(), finished=False)
    logprobs, reference = torch.randn(2, *rollouts.input_ids.shape, generator=generator)
    embeddings = torch.nn.functional.normalize(torch.randn(b, k, 5, generator=generator), dim=-1)

    def flat(own: torch.Tensor) -> torch.Tensor:  # rationales differ in their divergence alone
        return torch.zeros(own.shape[:2])

    algorithm = Algorithm(
        lambda rewards, keep: rewards, ppo_clip, truncation="none", gae_lambda=decay, kl_coef=0.1, kl_in="reward", kl_estimator="k1"
    )
    group = RoleRollouts(
        *(rollouts, ("a", "b"), embeddings, lengths, rollouts.finished.view(b, k)),
        divergence=from_tokens(algorithm.divergence(logprobs, reference, rollouts.rationale_mask), rollouts).unflatten(0, (b, k)),
        prefixes=embeddings.unsqueeze(2).expand(b, k, r + 1, 5),
    )
    shaped = shape_rewards(algorithm, torch.zeros(b, k), group, flat)
    got = at_tokens(token_advantages(algorithm, shaped, group, flat).flatten(0, 1), rollouts)
    for row, (prompt, length) in enumerate(zip(prompts, lengths.flatten().tolist(), strict=True)):
        cost = [0.1 * float(logprobs[row, prompt + t] - reference[row, prompt + t]) for t in range(length)]
        wanted = [-sum(decay ** (s - t) * cost[s] for s in range(t, length)) for t in range(length)]
        assert got[row, prompt : prompt + length].tolist() == pytest.approx(wanted, abs=1e-5)
        assert got[row, :prompt].eq(0).all()
        assert got[row, prompt + length :].eq(0).all()
