"""A folder with a LoRA adapter in place of a model: said what it is, and merged by the command that the message names."""

import shlex

import pytest
import torch
from peft import LoraConfig, get_peft_model

from src.modules.policy.merge_adapter import main
from src.modules.policy.model import Policy


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_adapter_is_named_and_merged(tiny_policy_folder, tmp_path, own_tokenizer):
    base = Policy.load(str(tiny_policy_folder))
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path / "an adapter"
    model.save_pretrained(folder)
    if own_tokenizer:
        base.tokenizer.save_pretrained(folder)
        base.model.config.save_pretrained(folder)  # as some tools do
    with pytest.raises(FileNotFoundError, match=rf"it is a LoRA adapter of '{tiny_policy_folder}'") as caught:
        Policy.load(str(folder))
    command = shlex.split(str(caught.value).partition(": python -m ")[2])
    assert command == ["src.modules.policy.merge_adapter", str(folder), f"{folder}-merged"]
    main(command[1:])
    ids = torch.arange(9)[None]
    merged = Policy.load(command[2])
    torch.testing.assert_close(merged.model(ids).logits, model(ids).logits)
    assert not torch.allclose(merged.model(ids).logits, Policy.load(str(tiny_policy_folder)).model(ids).logits, atol=1e-3)


def test_base_out_of_reach_is_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}')
    with pytest.raises(SystemExit, match=r"^merge_adapter: .*nothing.*; --base= names another base$") as caught:
        main([str(tmp_path), str(tmp_path / "merged")])
    assert "\n" not in str(caught.value)
