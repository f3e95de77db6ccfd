"""The names under which weights are pushed; needs no vLLM."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src.modules.vllm_weights import named_weights, plain_model
from tests.builders import small_policy, some_rollouts


def test_every_weight_has_its_name_in_a_checkpoint_once_and_a_tied_head_none() -> None:
    model = small_policy().model
    pushed = dict(named_weights(model))
    assert set(pushed) == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in pushed
    assert pushed["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()  # no copies
    untied = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert set(dict(named_weights(untied))) == set(untied.state_dict())


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_are_merged_under_plain_names_and_the_frozen_weights_stay_bit_by_bit(wrapped: bool) -> None:
    peft = pytest.importorskip("peft")
    policy = small_policy()
    names = {name for name, _ in policy.model.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm"] if wrapped else None)
    adapted = peft.get_peft_model(policy.model, config) if wrapped else peft.inject_adapter_in_model(config, policy.model)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(adapted.state_dict())
    pushed = dict(named_weights(adapted))
    assert set(pushed) == names
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())

    plain = small_policy(seed=1).model
    plain.load_state_dict(pushed, strict=False)  # strict would ask for the tied head
    ids = some_rollouts(policy).input_ids
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, plain_model(adapted)(ids).logits, atol=1e-4, rtol=1e-4)
