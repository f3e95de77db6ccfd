"""Side effects of vLLM's start, and engines that cannot start or die."""

import inspect
import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from src.modules.rollouts.vllm_engine import EngineError, require_device, start
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


def test_no_engine_starts_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    def starting(**settings: object) -> object:
        assert not torch.is_autocast_enabled("cpu")
        return start(**settings)

    monkeypatch.setattr("src.modules.rollouts.vllm.start", starting)
    policy = policy_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = engine(cpu_kv_cache_gib=0.07).generate(policy, prompts_of(policy), temperature=0.0)
    assert largest_mismatch(policy, rollouts) < 1e-4


def test_another_device_is_named() -> None:
    policy = policy_of()
    llm = engine().started(policy).llm
    require_device(llm, policy.device)
    with pytest.raises(EngineError, match=r"^vLLM took cpu, and the policy is on cuda:2: .*CUDA_VISIBLE_DEVICES=2"):
        require_device(llm, torch.device("cuda", 2))


def test_second_engine_that_sleeps_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "can only be used for one instance per process."
    assert words in inspect.getsource(gpu_worker())  # of the assertion that vLLM makes on a GPU
    monkeypatch.setattr("vllm.LLM.__init__", lambda *args, **kwargs: exec("assert False, words", {"words": words}))
    with pytest.raises(EngineError, match=r"one engine that sleeps: set rollout\.sleep=false"):
        engine(cpu_kv_cache_gib=0.09).generate(policy_of(), prompts_of(policy_of()))


def gpu_worker() -> Any:
    from vllm.v1.worker import gpu_worker

    return gpu_worker


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
