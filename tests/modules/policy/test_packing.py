"""Packed rollouts against every sequence alone, through transformers' forward and attention."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor

from src.modules.policy.attention.masked import checkpoint_contexts
from src.modules.policy.lora import add_lora
from src.modules.policy.model import Policy
from src.modules.policy.packing import pack, pool_packed, unpack
from src.modules.policy.pooling import pool
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


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> None:
    """Compares the gradients of a random weighting of two equal tensors."""
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    fast, slow = (torch.autograd.grad((x * upstream).sum(), inputs, allow_unused=True) for x in (ours, theirs))
    scale = max(float(gradient.abs().max()) for gradient in slow if gradient is not None)
    for one, other in zip(fast, slow, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


LENGTHS = [[5, 1, 9], [0, 7], [4], [0, 0], [3, 3, 3, 3]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_states_are_those_of_single_rows(architecture: str, attention: str) -> None:
    # Qwen2 and Qwen3 with grouped heads, Llama with a key-value head for every head
    policy = random_policy(architecture, num_key_value_heads=4 if architecture == "llama" else 2)
    policy.model.set_attn_implementation(attention)
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    ours, theirs = policy.hidden_states(rollouts, groups)[rollouts.attention_mask], torch.cat(alone(policy, rollouts))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, theirs, [p for p in policy.model.base_model.parameters() if p.requires_grad])


def test_log_probs_are_those_of_padded_rows() -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    (ours, entropy, _), (theirs, expected, _) = policy(rollouts, groups, 0.7), policy(rollouts, None, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, theirs, list(policy.parameters()))


@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
def test_pool_packed_is_pool(pooling: Any) -> None:
    rollouts, groups = grouped_rollouts(small_policy(), LENGTHS)  # several rollouts, prompts of different lengths, empty rationales
    packed = pack(rollouts, groups)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*packed.input_ids.shape, 7, generator=generator, requires_grad=True)
    ours, expected = pool_packed(states, packed, rollouts, pooling), pool(unpack(states, packed), rollouts.pooling_mask, pooling)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert_same_gradients(ours, expected, [states])


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "lora"])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
def test_packed_forward_is_that_of_single_rows(pooling: Any, layer: int, kind: str) -> None:
    policy = small_policy().train()
    policy.pooling, policy.layer = pooling, layer
    if kind == "checkpointing":
        policy.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(policy.model)})
    if kind == "lora":
        torch.manual_seed(0)
        add_lora(policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rollouts, groups = grouped_rollouts(policy, LENGTHS)
    logprobs, _, nothing = policy(rollouts, groups)
    assert nothing is None
    trained = [p for p in policy.parameters() if p.requires_grad]
    for grouping in (groups, None):
        expected = policy.embed(rollouts)
        values, entropies, ours = policy(rollouts, grouping, logprobs=False, embeddings=True)
        assert values is None
        assert entropies is None
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(ours, expected, trained)
        together, _, again = policy(rollouts, grouping, embeddings=True)
        torch.testing.assert_close(together, logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again, ours, atol=1e-6, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_mix_of_lengths(lengths: list[list[int]], seed: int) -> None:
    policy = small_policy()
    rollouts, groups = grouped_rollouts(policy, lengths, seed)
    with torch.no_grad():
        ours = policy.hidden_states(rollouts, groups)[rollouts.attention_mask]
        torch.testing.assert_close(ours, torch.cat(alone(policy, rollouts)), rtol=1e-5, atol=1e-5)


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
    policy.model.base_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.hidden_states(rollouts, groups)
    assert policy.model.config._attn_implementation == "sdpa"
