"""Packed rollouts against every sequence alone, through transformers' forward and attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.modules.policy.attention.shared_prompt import pack
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.types import Rollouts, join
from tests.builders import SENTENCES, small_policy
from tests.vllm_builders import random_policy


def grouped_rollouts(policy: Policy, lengths: list[list[int]], seed: int = 0) -> tuple[Rollouts, Tensor]:
    """A prompt for every inner list, with random rationales of these lengths, and the group of each row."""
    generator = torch.Generator().manual_seed(seed)
    texts = [SENTENCES[i % len(SENTENCES)][: 5 + 11 * i] for i in range(len(lengths))]
    groups = torch.tensor([i for i, own in enumerate(lengths) for _ in own])
    prompts = PromptRenderer(policy.tokenizer, "Name the terms.", 128)(texts).select(groups)
    ids = [torch.randint(5, len(policy.tokenizer), (length,), generator=generator) for own in lengths for length in own]
    return join(prompts, ids, torch.ones(len(ids), dtype=torch.bool), policy.pad_id), groups


def alone(policy: Policy, rollouts: Rollouts) -> list[Tensor]:
    """[length, D] states of each sequence, computed by itself."""
    rows = zip(rollouts.input_ids, rollouts.lengths.tolist(), strict=True)
    return [policy.model.base_model(input_ids=ids[:length].unsqueeze(0), use_cache=False).last_hidden_state[0] for ids, length in rows]


LENGTHS = [[5, 1, 9], [0, 7], [4], [0, 0], [3, 3, 3, 3]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_states_and_gradients_are_those_of_single_rows(architecture: str, attention: str) -> None:
    # Qwen2 and Qwen3 with grouped heads, Llama with a key-value head for every head
    policy = random_policy(architecture, num_key_value_heads=4 if architecture == "llama" else 2)
    policy.model.set_attn_implementation(attention)
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    together = policy.hidden_states(rollouts, groups)
    expected = alone(policy, rollouts)
    upstream = [torch.randn(states.shape, generator=torch.Generator().manual_seed(i)) for i, states in enumerate(expected)]
    for row, states in zip(together, expected, strict=True):
        torch.testing.assert_close(row[: len(states)], states, rtol=1e-5, atol=1e-5)

    parameters = [p for p in policy.model.base_model.parameters() if p.requires_grad]
    ours = sum((row[: len(up)] * up).sum() for row, up in zip(together, upstream, strict=True))
    theirs = sum((states * up).sum() for states, up in zip(expected, upstream, strict=True))
    fast, slow = torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)
    scale = max(float(gradient.abs().max()) for gradient in slow)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


def test_log_probs_and_gradients_are_those_of_single_rows() -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    (ours, entropy, _), (theirs, expected, _) = policy(rollouts, groups, 0.7), policy(rollouts, None, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    fast, slow = (torch.autograd.grad((values * upstream).sum(), parameters) for values in (ours, theirs))
    scale = max(float(gradient.abs().max()) for gradient in slow)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_mix_of_lengths(lengths: list[list[int]], seed: int) -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, lengths, seed)
    with torch.no_grad():
        together, expected = policy.hidden_states(rollouts, groups), alone(policy, rollouts)
    for row, states in zip(together, expected, strict=True):
        torch.testing.assert_close(row[: len(states)], states, rtol=1e-5, atol=1e-5)


def test_packed_row_has_no_padding() -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    packed = pack(rollouts, groups)
    prompts = {int(group): int(length) for group, length in zip(groups, rollouts.prompt_lengths, strict=True)}
    assert packed.input_ids.shape == (1, sum(prompts.values()) + sum(map(sum, LENGTHS)))
    for row, length in enumerate(rollouts.lengths.tolist()):
        assert torch.equal(packed.input_ids[0, packed.source[row, :length]], rollouts.input_ids[row, :length])
        assert packed.position_ids[0, packed.source[row, :length]].tolist() == list(range(length))


def test_frozen_encoder_embeds_packed_rollouts() -> None:
    policy = small_policy("frozen")
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    torch.testing.assert_close(policy.embed(rollouts, groups=groups), policy.embed(rollouts), rtol=1e-5, atol=1e-5)


def test_attention_dropout_of_the_model() -> None:
    policy = small_policy(attention_dropout=0.5)
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    mask = rollouts.attention_mask
    with torch.no_grad():
        runs = [policy.train(mode).hidden_states(rollouts, groups)[mask] for mode in (False, False, True)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], atol=1e-2)


def test_backward_uses_the_forward_dropout() -> None:
    policy = small_policy(attention_dropout=0.5).train()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    weight = policy.model.base_model.layers[-1].self_attn.v_proj.weight
    with torch.no_grad():
        step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3

    def loss() -> Tensor:
        torch.manual_seed(3)
        return policy(rollouts, groups)[0].sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            values.append(float(loss()))
            weight -= sign * step
    assert float((gradient * step).sum()) == pytest.approx((values[0] - values[1]) / 2, rel=0.05)


def test_autocast_changes_rounding_alone() -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    mask = rollouts.attention_mask
    with torch.no_grad():
        exact = policy.hidden_states(rollouts, groups)[mask]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = policy.hidden_states(rollouts, groups)[mask]
    assert float((exact - rounded).norm() / exact.norm()) < 0.05


def test_own_attention_is_restored_after_an_error() -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    policy.hidden_states(rollouts, groups)
    assert policy.model.config._attn_implementation == "sdpa"
    policy.model.base_model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="sliding_window"):
        policy.hidden_states(rollouts, groups)
    assert policy.model.config._attn_implementation == "sdpa"
