"""Small policies of several architectures, and parts for the tests of vLLM."""

import importlib.util
from typing import Any

import pytest
import torch

from src.modules.encoder.export import load_policy
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts.vllm import VLLMEngine
from src.modules.types import Rollouts
from tests.builders import SENTENCES, small_model, small_tokenizer
from tests.conftest import ROOT

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]

TEXTS = ["x", *SENTENCES, SENTENCES[0] + " " + SENTENCES[1], ""]


def random_policy(kind: str, **config: Any) -> Policy:
    """A policy of one of KINDS or WINDOWED with random weights."""
    tokenizer = small_tokenizer()
    return Policy(small_model(config.pop("vocab_size", len(tokenizer)), kind=kind, **config), tokenizer)


def end_often(policy: Policy, tokens: int) -> Policy:
    """Makes so many tokens end a rationale, so that rationales differ in length."""
    ids = torch.randperm(len(policy.tokenizer), generator=torch.Generator().manual_seed(0))[:tokens].tolist()
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, *ids]
    return policy


def policy_of(kind: str = "qwen2") -> Policy:
    """A policy for vLLM: heads of 32 are the least that its attention on a CPU takes."""
    if kind == "shipped":
        return load_policy(ROOT / "experiments" / "tiny_policy" / "weights")[0]
    shape: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 64} if kind == "qwen3" else {}
    return end_often(random_policy(kind, **shape), 40)


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


def largest_mismatch(policy: Policy, rollouts: Rollouts, temperature: float = 1.0) -> float:
    """The largest difference of an engine's log-probs from those of a plain pass of the policy."""
    with torch.no_grad():
        logprobs, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts), temperature)
    assert rollouts.logprobs is not None
    return float((rollouts.logprobs - logprobs).abs().max())


def check_rationales(rollouts: Rollouts, prompts: Prompts, n: int, limit: int, ends: set[int]) -> None:
    """Checks that each row has its prompt, ends with the first end token, or has `limit` tokens and is not finished."""
    for row, (ids, finished) in enumerate(zip(rollouts.rationales(), rollouts.finished.tolist(), strict=True)):
        prompt = prompts.ids[row // n]
        assert rollouts.input_ids[row, : len(prompt)].equal(prompt)
        assert not ends & set(ids[:-1].tolist())
        assert (int(ids[-1]) in ends) == finished
        assert finished or len(ids) == limit
