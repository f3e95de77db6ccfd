from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from src.modules.encoder.export import export, load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.lora import lora_settings, merged, without_lora
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from tests.builders import flat, off, some_rollouts, trained
from tests.vllm_builders import prompts_of


def adapted(folder: Path, moved: bool = True, **options: object) -> Policy:
    """The tiny policy with adapters that change its outputs, as after some training."""
    torch.manual_seed(0)  # of the adapters' first halves: their size decides how much a merge rounds
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})  # type: ignore[arg-type]
    policy = Policy.load(str(folder), lora=lora)
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3, generator=generator)
    return policy


@torch.no_grad()
def test_new_adapters_change_nothing(tiny_policy_folder: Path, tiny_policy: Policy) -> None:
    policy = adapted(tiny_policy_folder, moved=False)
    rollouts = some_rollouts(policy)
    assert torch.equal(policy.hidden_states(rollouts), tiny_policy.hidden_states(rollouts))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@torch.no_grad()
def test_without_lora_is_the_start(tiny_policy_folder: Path, tiny_policy: Policy) -> None:
    policy = adapted(tiny_policy_folder)
    rollouts = some_rollouts(policy)
    start, moved = tiny_policy.hidden_states(rollouts), policy.hidden_states(rollouts)
    assert not torch.allclose(moved, start, atol=1e-2)
    with without_lora(policy.model):
        assert torch.equal(policy.hidden_states(rollouts), start)
    assert torch.equal(policy.hidden_states(rollouts), moved)
    assert any(p.requires_grad for p in policy.parameters())


@torch.no_grad()
def test_merged_copy_computes_the_same(tiny_policy_folder: Path) -> None:
    policy = adapted(tiny_policy_folder)
    rollouts = some_rollouts(policy)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    plain = merged(policy.model)
    torch.testing.assert_close(
        plain.base_model(input_ids=rollouts.input_ids).last_hidden_state, policy.hidden_states(rollouts), atol=1e-5, rtol=1e-4
    )
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert merged(plain) is plain


def test_engine_samples_with_adapters(tiny_policy_folder: Path, tiny_policy: Policy) -> None:
    policy = adapted(tiny_policy_folder)
    prompts = prompts_of(policy)
    rollouts = HFEngine(8).generate(policy, prompts, n=1, temperature=0.0)
    plain = Policy(merged(policy.model), policy.tokenizer)
    assert torch.equal(rollouts.input_ids, HFEngine(8).generate(plain, prompts, n=1, temperature=0.0).input_ids)
    start = HFEngine(8).generate(tiny_policy, prompts, n=1, temperature=0.0)
    assert rollouts.embeddings is not None
    assert start.embeddings is not None
    assert not torch.allclose(rollouts.embeddings, start.embeddings, atol=1e-2)


@pytest.mark.parametrize("encoder", ["live", "frozen"])
def test_export_has_merged_adapters(tiny_policy_folder: Path, tmp_path: Path, encoder: str) -> None:
    policy = adapted(tiny_policy_folder)
    if encoder == "frozen":
        policy.frozen_encoder = Policy.load(str(tiny_policy_folder), encoder="frozen").frozen_encoder
    export(policy, EncoderSettings(), tmp_path / "export")
    rollouts = some_rollouts(policy)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again, _ = load_policy(tmp_path / "export")
    with torch.no_grad():
        states = policy.hidden_states(rollouts)
        torch.testing.assert_close(plain.base_model(input_ids=rollouts.input_ids).last_hidden_state, states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again.embed(rollouts), policy.embed(rollouts), atol=1e-5, rtol=1e-4)


def test_settings_round_trip(tiny_policy_folder: Path, tiny_policy: Policy) -> None:
    policy = adapted(tiny_policy_folder, lora_alpha=12)
    values = lora_settings(policy.model)
    assert values is not None
    again = Policy.load(str(tiny_policy_folder), lora=LoraConfig(**values))
    again.load_state_dict(policy.state_dict())
    rollouts = some_rollouts(policy)
    assert torch.equal(again.hidden_states(rollouts), policy.hidden_states(rollouts))
    assert lora_settings(tiny_policy.model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "the embeddings or the output layer"),
        ({"target_modules": ["embed_tokens"]}, "the embeddings or the output layer"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
    ],
)
def test_unsupported_adapters(tiny_policy_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tiny_policy_folder, **options)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_gradient_checkpointing_keeps_gradient(tiny_policy_folder: Path, lora: LoraConfig | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the adapters' first matrices
            policy = Policy.load(str(tiny_policy_folder), lora=lora, gradient_checkpointing=checkpointing).train()
        rollouts = some_rollouts(policy)
        for groups in (None, torch.tensor([0, 1, 2, 3])):
            policy.logprobs(rollouts, policy.hidden_states(rollouts, groups))[0].sum().backward()
        policy.embed(rollouts).sum().backward()
        assert policy.model.is_gradient_checkpointing == checkpointing
        gradients.append(flat(trained(policy)))
    assert off(*gradients) < 1e-5
