from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from src.modules.policy import logprobs
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool_prefixes
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts import decoder
from src.modules.rollouts.decoder import choose
from src.modules.rollouts.engine import Request, end_tokens
from src.modules.rollouts.hf import LEAST_TOKENS, MOST_TOKENS, HFEngine, fitting_tokens
from src.modules.types import Rollouts
from tests.builders import TRIPLETS, WINDOWED, fit, make, small_policy
from tests.vllm_builders import TEXTS, check_rationales, end_often, prompts_of, random_policy


def ending(architecture: str = "qwen2") -> Policy:
    """A policy whose rows finish at different lengths and leave the batch."""
    tied = architecture != "gemma3"  # which scales its embeddings, so that tied ones repeat a token
    return end_often(random_policy(architecture, tie_word_embeddings=tied), 60)


def generated(policy: Policy, prompts: Prompts, index: int, limit: int) -> torch.Tensor:
    """transformers' greedy continuation of one prompt."""
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=end_tokens(policy).tolist(), pad_token_id=policy.pad_id)
    ids = prompts.ids[index].unsqueeze(0)
    return policy.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", *WINDOWED])
@pytest.mark.parametrize("batch_tokens", [200, 2**18])
def test_greedy_rationales_are_transformers_generate(architecture, batch_tokens):
    policy = ending(architecture)
    prompts = prompts_of(policy)
    rollouts = HFEngine(16, batch_tokens).generate(policy, prompts, n=1, temperature=0.0)
    assert 0 < rollouts.finished.sum() < len(TEXTS) or rollouts.rationale_lengths.unique().numel() > 2
    for i, ours in enumerate(rollouts.rationales()):
        assert ours.tolist() == generated(policy, prompts, i, 16).tolist()


@pytest.mark.parametrize(
    ("architecture", "pooling", "layer", "n", "temperature"),
    [
        *((architecture, "mean", -1, n, t) for architecture in ("qwen2", "qwen3", "llama") for n, t in ((1, 0.0), (4, 1.0), (3, 0.7))),
        *((architecture, "mean", -1, 4, 1.0) for architecture in WINDOWED),
        *(("qwen2", pooling, layer, 3, 1.0) for pooling in ("mean", "eos", "max") for layer in (-1, -2)),
    ],
)
def test_log_probs_and_embeddings_are_a_plain_pass(architecture, pooling, layer, n, temperature):
    policy = ending(architecture)
    policy.pooling, policy.layer = pooling, layer
    rollouts = HFEngine(16, batch_tokens=300).generate(policy, prompts_of(policy), n, temperature, seed=3, prefixes=True)
    assert rollouts.rationale_lengths.unique().numel() > 2  # rows left the batch at different times
    assert 0 < rollouts.finished.sum() < len(rollouts) or n == 1  # eos pools the last token of either
    with torch.no_grad():
        expected, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts), temperature or 1.0)
        torch.testing.assert_close(rollouts.logprobs, expected, atol=1e-4, rtol=0)  # of the last layer, whatever is pooled
        for groups in (None, torch.arange(len(rollouts)) // n):
            torch.testing.assert_close(rollouts.embeddings, policy.embed(rollouts, None, groups), atol=1e-4, rtol=0)
        prefixes = pool_prefixes(policy.encoder_states(rollouts), rollouts, 16, pooling)
        torch.testing.assert_close(rollouts.prefix_embeddings, prefixes, atol=1e-4, rtol=0)


def test_early_ends_fill_prefixes():
    policy = end_often(random_policy("qwen2"), 399)  # almost every token ends a rationale
    rollouts = HFEngine(16).generate(policy, prompts_of(policy), n=2, prefixes=True)
    assert rollouts.rationale_lengths.max() < 16
    with torch.no_grad():
        expected = pool_prefixes(policy.hidden_states(rollouts), rollouts, 16)
    torch.testing.assert_close(rollouts.prefix_embeddings, expected, atol=1e-4, rtol=0)


def test_autocast_holds_keys_and_values_in_bfloat16(monkeypatch):
    policy, held = small_policy(), []
    cache = decoder.SharedPromptCache
    monkeypatch.setattr(decoder, "SharedPromptCache", lambda *how: held.append(cache(*how)) or held[-1])
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = HFEngine(16).generate(policy, prompts_of(policy), n=3, seed=3)
    assert {buffer.dtype for pair in held[0].prompt + held[0].own for buffer in pair} == {torch.bfloat16}
    with torch.no_grad():
        expected, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts))
    assert float((rollouts.logprobs - expected).abs().mean()) < 0.05


def test_seed_decides_in_any_batches():
    policy = small_policy()
    runs = [HFEngine(10, size).generate(policy, prompts_of(policy), n=2, seed=5).input_ids for size in (1, 200, 2**18)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], HFEngine(10).generate(policy, prompts_of(policy), n=2, seed=6).input_ids)


def test_own_seed_decides_in_any_company(tiny_policy: Policy) -> None:
    prompts = PromptRenderer(tiny_policy.tokenizer, "Name the terms.", 96)(["a graph", "the table", "a graph"])
    written = HFEngine(8).generate(tiny_policy, prompts, n=2, temperature=1.0, seed=torch.tensor([7, 8, 9])).rationales()
    alone = HFEngine(8).generate(tiny_policy, prompts.select(torch.tensor([1])), n=2, temperature=1.0, seed=torch.tensor([8])).rationales()
    assert [ids.tolist() for ids in written[2:4]] == [ids.tolist() for ids in alone]
    assert [ids.tolist() for ids in written[:2]] != [ids.tolist() for ids in written[4:]]


@pytest.mark.parametrize("architecture", ["qwen2", *WINDOWED])
@pytest.mark.parametrize("batch_tokens", [300, 2**18])
def test_requests_are_answered_together_as_alone(architecture: str, batch_tokens: int) -> None:
    policy, engine = ending(architecture), HFEngine(16, batch_tokens)
    prompts, one = prompts_of(policy), torch.tensor([1])
    asked = [
        *(Request(prompts, 3, 1.0, 5, prefixes=True), Request(prompts.select(one), 1, 0.7, torch.tensor([7]))),
        *(Request(prompts, 1, 0.0, 0), Request(prompts.select(one), 6, 0.5, 8), Request(prompts.select(one), 1, 0.0, 0, prefixes=True)),
    ]
    for request, rollouts in zip(asked, engine.generate_all(policy, asked), strict=True):
        alone = engine.generate(policy, request.prompts, request.n, request.temperature, request.seed, request.prefixes)
        assert torch.equal(rollouts.input_ids, alone.input_ids)
        for name in ("logprobs", "embeddings", "prompt_embeddings", "prefix_embeddings"):
            ours, theirs = getattr(rollouts, name), getattr(alone, name)
            assert (theirs is None) == (ours is None) == (name == "prefix_embeddings" and not request.prefixes)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_roles_of_a_batch_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, before = [], decoder.Decoder.write
    monkeypatch.setattr(decoder.Decoder, "write", lambda self, run: (rows.append(len(self.rows)), before(self, run)))
    fit(make())
    assert rows[1:] == [len(TRIPLETS) * (3 + 2)]  # three of each positive, one of each query and negative; first is the check at the start


def test_own_generate_of_a_subclass_is_asked() -> None:
    class Own:
        def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
            asked.append(kwargs["n"])
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    asked: list[int] = []
    fit(make(engine=type("Mixed", (Own, HFEngine), {})(6)))
    assert asked == [3, 1]


def test_rationales_follow_their_prompt_and_end_once():
    policy = ending()
    rollouts = HFEngine(12).generate(policy, prompts_of(policy), n=3, seed=1)
    check_rationales(rollouts, prompts_of(policy), 3, 12, set(end_tokens(policy).tolist()))


def test_sampling_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 8, generator=generator), torch.randn(6, 8, generator=generator)
    draws = torch.rand(40_000, generator=generator)
    ids, chosen = choose(hidden.expand(len(draws), 8), weight, draws, torch.full((len(draws), 1), 0.8))
    expected = torch.softmax(hidden @ weight.T / 0.8, dim=-1)[0]
    torch.testing.assert_close(torch.bincount(ids, minlength=6) / len(draws), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(chosen.exp(), expected[ids])


class Largest(TorchDispatchMode):
    """Elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("temperatures", [None, torch.linspace(0.5, 2.0, 200).unsqueeze(1)])
def test_chunks_never_hold_all_logits(monkeypatch, temperatures):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(200, 8, generator=generator), torch.randn(50, 8, generator=generator)
    draws = torch.rand(200, generator=generator)
    at_once = choose(hidden, weight, draws, temperatures)
    monkeypatch.setitem(logprobs._CHUNK_LOGITS, "cpu", 0)
    with Largest() as largest:
        parts = choose(hidden, weight, draws, temperatures)
    assert largest.elements == 64 * len(weight)
    assert torch.equal(at_once[0], parts[0])
    torch.testing.assert_close(at_once[1], parts[1])


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-24])
def test_extreme_draws_take_no_impossible_token(draw):
    weight = torch.tensor([[-torch.inf], [0.0], [0.0], [-torch.inf]])
    ids, _ = choose(torch.ones(1, 1), weight, torch.tensor([draw]), torch.ones(1, 1))
    assert ids.item() in (1, 2)


def test_engine_restores_mode_attention_and_random_state():
    policy = small_policy().train()
    policy.model.base_model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    state, attention = torch.get_rng_state(), policy.model.config._attn_implementation
    HFEngine(3).generate(policy, prompts_of(policy))
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.config._attn_implementation == attention


def test_frozen_encoder_and_no_prefixes():
    policy = small_policy("frozen")
    rollouts = HFEngine(3).generate(policy, prompts_of(policy))
    assert rollouts.embeddings is rollouts.prefix_embeddings is None
    assert HFEngine(3).generate(small_policy(), prompts_of(policy)).prefix_embeddings is None


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"max_new_tokens": 4, "batch_tokens": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="at least"):
        HFEngine(**settings)


def test_budget_is_half_of_what_is_free_in_keys_and_values():
    policy = small_policy()
    cache = policy.model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 10
    state = 12 * sum(weight.numel() for weight in policy.parameters())  # gradients and AdamW's moments, that the first update adds
    assert fitting_tokens(policy, state + 2 * 50_000 * int(token)) == 50_000
    assert fitting_tokens(policy, 0) == LEAST_TOKENS
    assert fitting_tokens(policy, 2**60) == MOST_TOKENS
    assert fitting_tokens(policy.requires_grad_(False), 2 * 50_000 * int(token)) == 50_000  # an encoder that is loaded
    engine = HFEngine(4)
    engine.generate(policy, prompts_of(policy), n=1)
    assert engine.batch_tokens == MOST_TOKENS  # on a CPU
