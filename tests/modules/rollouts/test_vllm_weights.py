"""The names of pushed weights; needs no vLLM."""

import copy

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from src.modules.policy.lora import add_lora, without_lora
from src.modules.rollouts.vllm_engine import named_weights
from tests.builders import small_policy, some_rollouts


def test_every_weight_has_its_checkpoint_name_once() -> None:
    model = small_policy().model
    pushed = dict(named_weights(model))
    assert set(pushed) == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in pushed
    assert pushed["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()  # no copies
    untied = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert set(dict(named_weights(untied))) == set(untied.state_dict())


def test_adapters_are_merged_into_copies() -> None:
    policy = small_policy()
    names = {name for name, _ in policy.model.named_parameters()}
    add_lora(policy.model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"]))
    before = copy.deepcopy(policy.model.state_dict())
    pushed = dict(named_weights(policy.model))
    assert set(pushed) == names
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())

    plain, ids = small_policy(seed=1).model, some_rollouts(policy).input_ids
    plain.load_state_dict(pushed, strict=False)  # strict would ask for the tied head
    with torch.no_grad():
        adapted = policy.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        with without_lora(policy.model):
            plain.load_state_dict(dict(named_weights(policy.model)), strict=False)
            torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits)
    assert (plain(ids).logits - adapted).abs().max() > 0.1
