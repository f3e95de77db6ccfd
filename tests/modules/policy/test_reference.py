from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from src.modules.policy.model import Policy
from src.modules.policy.reference import Reference
from src.modules.rollouts.hf import HFEngine
from tests.vllm_builders import prompts_of

TEMPERATURE = 0.8


def move(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_reference_stays_where_training_began(tiny_policy_folder: Path, tiny_policy: Policy, lora: LoraConfig | None) -> None:
    policy = Policy.load(str(tiny_policy_folder), lora=lora)
    reference = Reference(policy)
    rollouts = HFEngine(6).generate(policy, prompts_of(policy), n=2)
    with torch.no_grad():
        expected, _ = tiny_policy.logprobs(rollouts, tiny_policy.hidden_states(rollouts), TEMPERATURE)
        torch.testing.assert_close(reference.logprobs(rollouts, 2, 100, TEMPERATURE), expected, atol=1e-5, rtol=1e-5)
        move(policy)
        now, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts), TEMPERATURE)
    torch.testing.assert_close(reference.logprobs(rollouts, 2, 100, TEMPERATURE), expected, atol=1e-5, rtol=1e-5)
    assert (now - expected).abs().max() > 1e-3


def test_adapters_need_no_second_model(tiny_policy_folder: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), lora=LoraConfig(r=4, target_modules="all-linear"))
    assert Reference(policy).policy is policy
    plain = Policy.load(str(tiny_policy_folder))
    copy = Reference(plain).policy
    assert copy is not plain
    assert not any(p.requires_grad for p in copy.parameters())
