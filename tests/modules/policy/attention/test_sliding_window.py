"""Layers that see a window of the last tokens, against transformers' own masks over each whole sequence."""

import pytest
import torch
from torch import Tensor

from src.modules.policy.attention.shared_cache import SharedPromptCache
from src.modules.policy.buffers import Buffers
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.checks import require_readable
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts, join
from tests.builders import WINDOWED
from tests.modules.policy.test_packing import alone, assert_same_gradients
from tests.vllm_builders import prompts_of, random_policy

GROUPS = [(30, [5, 1, 19]), (3, [12, 2]), (8, [10]), (7, [0, 1]), (9, [0]), (2, [3, 3, 4])]
"""(tokens of the prompt, tokens of each rationale), with a window of 8: beyond it in the prompt, in the rationale, at the edge, never."""


def rollouts_of(policy: Policy) -> tuple[Rollouts, Tensor]:
    """Random tokens in GROUPS, and the group of each row."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([i for i, (_, own) in enumerate(GROUPS) for _ in own])

    def ids(lengths: list[int]) -> tuple[Tensor, ...]:
        return tuple(torch.randint(5, len(policy.tokenizer), (length,), generator=generator) for length in lengths)

    lengths = [prompt for prompt, _ in GROUPS]
    prompts = Prompts(ids(lengths), torch.ones(len(GROUPS), dtype=torch.long), torch.tensor(lengths) - 1).select(groups)
    return join(prompts, ids([n for _, own in GROUPS for n in own]), torch.ones(len(groups), dtype=torch.bool), policy.pad_id), groups


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("window", [1, 8, 48])  # the longest sequence has 49 tokens
def test_packed_pass_is_transformers_over_each_sequence(kind: str, attention: str, window: int) -> None:
    policy = random_policy(kind, sliding_window=window)
    policy.model.set_attn_implementation(attention)
    rollouts, groups = rollouts_of(policy)
    states = alone(policy, rollouts)
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    ours = (policy.hidden_states(rollouts, groups)[rollouts.attention_mask], *policy(rollouts, groups, embeddings=True))
    expected = (torch.cat(states), *policy.logprobs(rollouts, padded), pool(padded, rollouts.pooling_mask))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    together = [torch.cat([value.flatten() for value in values]) for values in (ours, expected)]
    assert_same_gradients(*together, [p for p in policy.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", WINDOWED)
def test_the_window_tells(kind: str) -> None:
    states = []
    for window in (8, 9, 200):
        policy = random_policy(kind, sliding_window=window)
        rollouts, groups = rollouts_of(policy)
        with torch.no_grad():
            states.append(policy.hidden_states(rollouts, groups))
    for narrow, wide in ((states[0], states[1]), (states[1], states[2])):
        assert torch.allclose(narrow[0, :8], wide[0, :8], atol=1e-5)
        assert not torch.allclose(narrow[0, 9:30], wide[0, 9:30], atol=1e-2)


def test_attention_dropout_within_a_window() -> None:
    """With dropout attention is the loop, whatever the device; nothing dropped, it is the pass without."""
    policy = random_policy("mistral", attention_dropout=1e-9).train()
    rollouts, groups = rollouts_of(policy)
    with torch.no_grad():
        ours, exact = policy(rollouts, groups)[0], policy.eval()(rollouts, groups)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_no_mask_is_made_where_no_layer_needs_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy(kind, **({"sliding_window": 200} if kind == "mistral" else {}))
    masks: list[object] = []
    attend, narrow = torch.nn.functional.scaled_dot_product_attention, SharedPromptCache.bias_within

    def watched(*states: Tensor, is_causal: bool = False, attn_mask: Tensor | None = None, **how: object) -> Tensor:
        masks.append(attn_mask)
        return attend(*states, is_causal=is_causal, attn_mask=attn_mask, **how)  # type: ignore[arg-type]

    def bias(self: SharedPromptCache, window: int | None) -> Tensor:
        found = narrow(self, window)
        assert found.data_ptr() == self.bias.data_ptr()
        return found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(SharedPromptCache, "bias_within", bias)
    rollouts, _ = rollouts_of(policy)
    policy.hidden_states(rollouts, torch.arange(len(rollouts)))
    HFEngine(6).generate(policy, prompts_of(policy), n=2)
    assert masks
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("window", [1, 4, 12, 13])  # the last query is the 13th token
def test_bias_of_a_step(window: int) -> None:
    lengths, n, longest = torch.tensor([6, 2]), 2, 6
    cache = SharedPromptCache(lengths, torch.tensor([0, 0, 1, 1]), 2 * n, longest, 8, Buffers())
    cache.used = 7
    for column in range(7):
        cache.column.fill_(column)
        cache.positions()
        position = (lengths + column).repeat_interleave(n)
        for row, (prompt, query) in enumerate(zip(lengths.repeat_interleave(n).tolist(), position.tolist(), strict=True)):
            keys = [*range(prompt), *[-1000] * (longest - prompt), *range(prompt, prompt + 7)]  # -1000: padding
            seen = [0 <= key <= query and key > query - window for key in keys]
            assert (cache.bias_within(window)[row] == 0).tolist() == seen


@pytest.mark.parametrize("kind", WINDOWED)
def test_backbones_are_compared_beyond_their_window(kind: str) -> None:
    require_readable(random_policy(kind), 40)
    require_readable(random_policy(kind, sliding_window=200), 40)


def test_a_window_that_is_not_handed_over_is_refused() -> None:
    policy = random_policy("qwen2_window", sliding_window=20)
    policy.model.base_model.layers[1].self_attn.sliding_window = None  # the model's own mask has one
    require_readable(policy, 20)
    with pytest.raises(ValueError, match=r"log-probs of Qwen2ForCausalLM are off by .* share their prompt's computation"):
        require_readable(policy, 40)
