"""Side effects of vLLM's start, and engines that cannot start or die."""

import os
import random

import numpy as np
import pytest
import torch

from src.modules.rollouts.vllm_engine import EngineError
from tests.vllm_builders import NEEDS_VLLM, engine, largest_mismatch, policy_of, prompts_of

pytestmark = NEEDS_VLLM


def seed_all() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def test_start_leaves_the_process_unchanged() -> None:
    policy = policy_of().train()
    seed_all()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    engine(cpu_kv_cache_gib=0.05).generate(policy, prompts_of(policy))  # an engine of its own
    drawn = random.random(), np.random.rand(), float(torch.rand(1))
    seed_all()
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(1)))
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == threads
    assert {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} == environment
    assert torch.is_grad_enabled()
    assert policy.training


def test_too_little_memory_is_one_line() -> None:
    with pytest.raises(EngineError, match=r"vLLM cannot start \(.*memory for the cache.*rollout\.cpu_kv_cache_gib$") as caught:
        engine(cpu_kv_cache_gib=1e-6).generate(policy_of(), prompts_of(policy_of()))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["dead", "memory"])
def test_dead_engine_is_one_line_and_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    error = {"dead": EngineDeadError(), "memory": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")}[name]
    policy, dying = policy_of(), engine(cpu_kv_cache_gib=0.06)
    llm = dying.started(policy).llm

    def fail() -> None:
        raise error

    monkeypatch.setattr(llm.llm_engine, "step", fail)
    with pytest.raises(EngineError, match=r"^vLLM died .*lower rollout\.gpu_memory_utilization, module\.num_generations or") as caught:
        dying.generate(policy, prompts_of(policy))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    assert largest_mismatch(policy, dying.generate(policy, prompts_of(policy))) < 1e-4
