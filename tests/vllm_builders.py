"""Small real parts for the tests of vLLM."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from src.modules.encoder.export import load_policy
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts.vllm import VLLMEngine
from src.modules.types import Rollouts
from tests.builders import SENTENCES, small_tokenizer
from tests.conftest import ROOT

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]

TEXTS = ["x", *SENTENCES, SENTENCES[0] + " " + SENTENCES[1], ""]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "untied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 64}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
}


def policy_of(kind: str = "qwen2") -> Policy:
    """Random weights; heads of 32, which is the least that vLLM's attention on a CPU takes."""
    if kind == "shipped":
        return load_policy(ROOT / "experiments" / "tiny_policy" / "weights")[0]
    tokenizer = small_tokenizer()
    model, config, extra = KINDS[kind]
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model(config(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2, **shape, **extra))
    policy = Policy(made.eval(), tokenizer)
    ids = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))[:40].tolist()
    policy.model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ids]  # so that rationales differ in length
    return policy


def engine(max_new_tokens: int = 16, **settings: Any) -> VLLMEngine:
    small: dict[str, Any] = {"max_prompt_tokens": 128, "dtype": "float32", "cpu_kv_cache_gib": 0.1}
    return VLLMEngine(max_new_tokens, **(small | {"gpu_memory_utilization": 0.05, "sleep": False} | settings))


def prompts_of(policy: Policy) -> Prompts:
    return PromptRenderer(policy.tokenizer, "Name the terms.", 128)(TEXTS)


def step(policy: Policy, **options: Any) -> None:
    """One large AdamW step on a gradient of noise."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-2, **options)
    generator = torch.Generator().manual_seed(1)
    for weight in policy.model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
    optimizer.step()


def largest_gap(policy: Policy, rollouts: Rollouts, temperature: float = 1.0) -> float:
    """Distance of an engine's log-probs from those of a plain pass of the policy."""
    with torch.no_grad():
        logprobs, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts), temperature)
    assert rollouts.logprobs is not None
    return float((rollouts.logprobs - logprobs).abs().max())
