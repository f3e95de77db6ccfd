from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.loading import has_dropout, set_attention_dropout
from src.modules.policy.model import Policy
from tests.builders import some_rollouts


def test_a_model_without_dropout_gets_some_in_training_and_its_config_none(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), attention_dropout=0.3)
    rollouts = some_rollouts(policy)
    assert torch.equal(policy.embed(rollouts), policy.embed(rollouts))  # not yet in training
    policy.train()
    assert not torch.allclose(policy.embed(rollouts), policy.embed(rollouts), atol=1e-3)
    assert Policy.load(str(export(policy, EncoderSettings(), tmp_path / "export"))).model.config.attention_dropout == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(tiny_policy_folder: Path, share: float) -> None:
    with pytest.raises(ValueError, match=f"policy.attention_dropout={share}"):
        Policy.load(str(tiny_policy_folder), attention_dropout=share)


def test_a_model_that_has_no_such_setting_is_named() -> None:
    with pytest.raises(ValueError, match="Linear has no attention_dropout"):
        set_attention_dropout(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize(
    ("attention", "lora", "expected"), [(None, None, False), (0.0, 0.0, False), (0.1, None, True), (None, 0.1, True), (0.1, 0.0, True)]
)
def test_whether_anything_is_dropped(tiny_policy_folder: Path, attention: float | None, lora: float | None, expected: bool) -> None:
    adapters = None if lora is None else LoraConfig(r=2, lora_dropout=lora, target_modules="all-linear")
    policy = Policy.load(str(tiny_policy_folder), attention_dropout=attention, lora=adapters)
    before, modes = torch.get_rng_state(), [module.training for module in policy.modules()]
    assert has_dropout(policy, some_rollouts(policy)) == expected
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
