"""vLLM against HFEngine, which is tested against transformers."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from src.modules.encoder.encoder import WRITTEN_AT_A_TIME, RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.lora import add_lora, without_lora
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts import vllm_engine
from src.modules.rollouts.engine import Request, end_tokens
from src.modules.rollouts.hf import HFEngine
from src.modules.rollouts.vllm_engine import EngineError
from src.modules.types import Rollouts
from tests.builders import KINDS, small_tokenizer
from tests.vllm_builders import NEEDS_VLLM, TEXTS, check_rationales, engine, largest_mismatch, policy_of, prompts_of, random_policy, step

pytestmark = NEEDS_VLLM


def assert_greedy_as_hf(policy: Policy) -> Rollouts:
    theirs = engine().generate(policy, prompts_of(policy), temperature=0.0)
    ours = HFEngine(16).generate(policy, prompts_of(policy), temperature=0.0)
    assert torch.equal(theirs.input_ids, ours.input_ids)
    assert torch.equal(theirs.finished, ours.finished)
    assert theirs.embeddings is None
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    return theirs


@pytest.mark.parametrize("kind", [*KINDS, "shipped"])
def test_greedy_rationales_are_the_trainers_after_a_step(kind: str) -> None:
    policy = policy_of(kind)
    before = assert_greedy_as_hf(policy)
    step(policy)
    after = assert_greedy_as_hf(policy)
    assert before.input_ids.shape != after.input_ids.shape or not torch.equal(before.input_ids, after.input_ids)


def test_encoder_pushes_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    pushes: list[Any] = []
    push = vllm_engine.push
    monkeypatch.setattr(vllm_engine, "push", lambda llm, model: pushes.append(model) or push(llm, model))
    settings = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=128, max_new_tokens=16)
    texts = [text for text in TEXTS if text]
    monkeypatch.setitem(WRITTEN_AT_A_TIME, "cpu", 2)
    vectors = RationaleEncoder(policy, settings, engine()).encode(texts)
    assert len(pushes) == 1
    np.testing.assert_allclose(vectors, RationaleEncoder(policy, settings, HFEngine(16)).encode(texts), atol=1e-4)
    step(policy)
    RationaleEncoder(policy, settings, engine()).encode(texts)
    assert len(pushes) == 2
    assert_greedy_as_hf(policy)  # and outside of it, at every call
    assert len(pushes) == 3


WAYS: dict[str, Callable[[Policy], Any]] = {
    "foreach": functools.partial(step, foreach=True),
    "fused": functools.partial(step, fused=True),
    "load_state_dict": lambda policy: policy.model.load_state_dict({name: -w for name, w in policy.model.state_dict().items()}),
    "data": lambda policy: [w.data.mul_(-1) for w in policy.model.parameters()],  # torch's version counters do not see it
}


@pytest.mark.parametrize("way", WAYS)
def test_any_change_of_weights_reaches_the_engine(way: str) -> None:
    policy = policy_of()
    before = engine().generate(policy, prompts_of(policy), temperature=0.0)
    WAYS[way](policy)
    assert largest_mismatch(policy, before) > 0.1
    assert_greedy_as_hf(policy)


@pytest.mark.parametrize(
    ("left_out", "dtype"),
    [("push", "float32"), ("head", "float32"), ("adapters", "float32"), ("push", "bfloat16"), ("adapters", "bfloat16")],
)
def test_stale_copy_is_an_error(left_out: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    if left_out == "adapters":
        add_lora(policy.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))  # zeros at first
    generate = functools.partial(engine(dtype=dtype).generate, policy, prompts_of(policy), temperature=0.0)
    before = generate().input_ids
    for _ in range(3):
        step(policy)
    left = {
        "push": ("push", lambda llm, model: None),
        "head": ("_repack_head", lambda model: None),
        "adapters": ("named_weights", functools.partial(without_adapters, vllm_engine.named_weights)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, *left[left_out])
        with pytest.raises(EngineError, match=rf"^vLLM does not sample from the policy's weights: .* rounding in {dtype} explains"):
            generate()
    assert not torch.equal(generate().input_ids, before)


def without_adapters(named_weights: Any, model: Any) -> Any:
    with without_lora(model):
        yield from named_weights(model)


def test_stale_keys_show_in_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    prompts = prompts_of(policy)
    assert prompts.lengths.max() > 2 * 32  # more than a block of the prefix cache
    assert largest_mismatch(policy, engine().generate(policy, prompts, temperature=0.0)) < 1e-4
    step(policy)
    with monkeypatch.context() as patch:
        patch.setattr(engine().started(policy).llm, "reset_prefix_cache", lambda: True)
        assert largest_mismatch(policy, engine().generate(policy, prompts, temperature=0.0)) > 1e-2
    assert largest_mismatch(policy, engine().generate(policy, prompts, temperature=0.0)) < 1e-4


def test_requests_are_answered_together() -> None:
    policy = policy_of()
    prompts, one = prompts_of(policy), engine()
    asked = [Request(prompts, 3, 1.0, 5), Request(prompts, 1, 0.7, 6), Request(prompts, 2, 0.0, 0)]
    for request, rollouts in zip(asked, one.generate_all(policy, asked), strict=True):
        alone = one.generate(policy, prompts, request.n, request.temperature, request.seed)
        assert torch.equal(rollouts.input_ids, alone.input_ids)
        torch.testing.assert_close(rollouts.logprobs, alone.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "untied"])
def test_rows_that_pad_the_vocabulary_are_never_sampled(kind: str) -> None:
    known = len(small_tokenizer())
    policy = random_policy(kind, vocab_size=known + 70, hidden_size=64, num_attention_heads=2)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[known:] *= 20  # else they would be the likeliest
    prompts = prompts_of(policy)
    rollouts = engine().generate(policy, prompts, n=4)
    assert rollouts.input_ids.max() < known
    logits = policy.model(rollouts.input_ids).logits[:, :-1]
    assert (logits[rollouts.rationale_mask[:, 1:]].argmax(dim=-1) >= known).float().mean() > 0.2
    own = logits[..., :known].log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(rollouts.logprobs[:, 1:], own * rollouts.rationale_mask[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_rationales_and_log_probs(temperature: float) -> None:
    policy = policy_of()
    prompts = prompts_of(policy)
    rollouts = engine().generate(policy, prompts, n=3, temperature=temperature, seed=5)
    assert len(rollouts) == 3 * len(prompts)
    assert largest_mismatch(policy, rollouts, temperature) < 1e-4
    check_rationales(rollouts, prompts, 3, 16, set(end_tokens(policy).tolist()))
    assert torch.equal(rollouts.input_ids, engine().generate(policy, prompts, 3, temperature, seed=5).input_ids)
    assert not torch.equal(rollouts.input_ids, engine().generate(policy, prompts, 3, temperature, seed=6).input_ids)
    assert len({tuple(ids.tolist()) for ids in rollouts.rationales()[-3:]}) > 1


def test_several_greedy_rationales_are_equal() -> None:
    policy = policy_of()
    one, two = (engine().generate(policy, prompts_of(policy), n, 0.0) for n in (1, 2))
    assert torch.equal(two.input_ids, one.input_ids.repeat_interleave(2, dim=0))


def test_bfloat16_weights_stay_close_to_float32_ones() -> None:
    policy = policy_of("shipped")
    rollouts = engine(dtype="bfloat16").generate(policy, prompts_of(policy), temperature=0.0)
    assert 1e-4 < largest_mismatch(policy, rollouts) < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_engine_wakes_with_the_trainers_weights() -> None:
    policy = policy_of("shipped").to("cuda")
    for _ in range(3):
        rollouts = engine(sleep=True).generate(policy, prompts_of(policy), temperature=0.0)
        assert largest_mismatch(policy, rollouts) < 1e-2
        step(policy)


def test_adapters_are_sampled_merged() -> None:
    policy = policy_of()
    add_lora(policy.model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    before = assert_greedy_as_hf(policy)
    step(policy)
    assert not torch.equal(assert_greedy_as_hf(policy).input_ids, before.input_ids)


def test_prompt_at_the_limit() -> None:
    policy = policy_of()
    full = Prompts((torch.arange(5, 255),), torch.tensor([1]), torch.tensor([200]))
    rollouts = engine(max_prompt_tokens=1024).generate(policy, full, n=2)  # the policy's context is 256
    assert rollouts.rationale_lengths.max() <= 6
    with pytest.raises(ValueError, match=r"250 tokens leaves no room for a rationale.*144 tokens"):
        engine().generate(policy, full)


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"max_prompt_tokens": 0}, {"tensor_parallel": 0}, {"gpu_memory_utilization": 1.5}]
)
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"rollout.{next(iter(settings))}="):
        engine(**settings)
