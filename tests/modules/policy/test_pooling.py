from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from src.modules.policy.pooling import POOLINGS, pool, pool_prefixes, states_at
from tests.builders import small_policy, some_rollouts
from tests.oracles import last_of_selected, max_of_selected, mean_of_selected

ORACLES = {"mean": mean_of_selected, "eos": last_of_selected, "max": max_of_selected}
every_pooling = pytest.mark.parametrize("pooling", ORACLES)


def random_case(n: int, t: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, t, generator=generator) < 0.5
    mask[torch.arange(n), torch.randint(t, (n,), generator=generator)] = True  # at least one token a row
    return torch.randn(n, t, d, generator=generator), mask


def test_every_pooling_has_an_oracle() -> None:
    assert set(POOLINGS) == set(ORACLES)


@every_pooling
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 4), t=st.integers(1, 9), d=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_values_and_gradients_are_the_oracles(pooling: str, n: int, t: int, d: int, seed: int) -> None:
    hidden, mask = random_case(n, t, d, seed)
    hidden.requires_grad_()
    fast, slow = pool(hidden, mask, pooling), ORACLES[pooling](hidden, mask)
    upstream = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    fast_gradient, slow_gradient = (torch.autograd.grad((pooled * upstream).sum(), hidden)[0] for pooled in (fast, slow))
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-5, atol=1e-6)


@every_pooling
def test_padding_side_does_not_matter(pooling: str) -> None:
    hidden, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 5])
    right, left = torch.arange(7) < lengths.unsqueeze(1), torch.arange(7) >= 7 - lengths.unsqueeze(1)
    shifted = torch.stack([states.roll(7 - length, dims=0) for states, length in zip(hidden, lengths.tolist(), strict=True)])
    torch.testing.assert_close(pool(shifted, left, pooling), pool(hidden, right, pooling))


@every_pooling
def test_token_by_token(pooling: str) -> None:
    hidden, way = torch.randn(3, 8, 5), POOLINGS[pooling]
    begun = way.begin(hidden[:, :3], torch.ones(3, 3, dtype=torch.bool))
    for t in range(3, 8):
        begun = way.extend(begun, hidden[:, t])
    everything = torch.ones(3, 8, dtype=torch.bool)
    torch.testing.assert_close(way.finish(begun, everything.sum(dim=1)), pool(hidden, everything, pooling))


@every_pooling
def test_prefixes_are_those_of_cut_rationales(pooling: str) -> None:
    rollouts = some_rollouts(small_policy(), rationale_lengths=(5, 0, 9, 1))
    hidden = torch.randn(*rollouts.input_ids.shape, 6)
    prefixes = pool_prefixes(hidden, rollouts, 9, pooling)
    assert prefixes.shape == (4, 10, 6)
    for t in range(10):
        cut = replace(rollouts, lengths=torch.minimum(rollouts.prompt_lengths + t, rollouts.lengths))
        torch.testing.assert_close(prefixes[:, t], pool(hidden, cut.pooling_mask, pooling))


@every_pooling
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_states_are_pooled_in_float32(pooling: str, autocast: bool) -> None:
    hidden, mask = random_case(3, 200, 16, seed=0)
    hidden = hidden if autocast else hidden.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pooled = pool(hidden, mask, pooling)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), ORACLES[pooling](hidden, mask), rtol=1e-5, atol=1e-6)


@every_pooling
def test_states_outside_mask_and_zero_tokens(pooling: str) -> None:
    hidden, mask = random_case(2, 5, 3, seed=1)
    mask[:, 2] = False
    expected = pool(hidden, mask, pooling)
    hidden[:, 2] = float("nan")
    torch.testing.assert_close(pool(hidden, mask, pooling), expected)
    with pytest.raises(ValueError, match=r"zero tokens in rows \[1, 2\]"):
        pool(torch.zeros(3, 2, 4), torch.tensor([[True, False], [False, False], [False, False]]), pooling)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_states_are_those_that_transformers_lists(layer: int) -> None:
    policy = small_policy()
    ids = some_rollouts(policy).input_ids
    listed = policy.model(input_ids=ids, output_hidden_states=True).hidden_states
    last, states = states_at(policy.model.base_model, layer, input_ids=ids)
    torch.testing.assert_close(last, listed[-1])
    torch.testing.assert_close(states, listed[layer])
    assert not policy.model.base_model.layers[-1]._forward_pre_hooks


def test_backbone_without_layers() -> None:
    with pytest.raises(ValueError, match=r"policy.layer=-2: Linear has no `layers`"):
        states_at(nn.Linear(2, 2), -2)
