import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.modules.policy.loading import load_model
from src.modules.policy.model import ENCODER_FOLDER, Policy, evaluation_mode
from src.modules.policy.pooling import pool
from tests.builders import small_model, small_policy, small_tokenizer, some_rollouts
from tests.conftest import ROOT
from tests.hub_server import Hub, local_hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder with weights in bfloat16, as most checkpoints on the hub are."""
    folder = tmp_path_factory.mktemp("policy")
    policy = small_policy()
    policy.model.bfloat16().save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def exported(saved: Path, tmp_path: Path) -> Path:
    """The same with another model as its frozen encoder."""
    folder = Path(shutil.copytree(saved, tmp_path / "exported"))
    small_model(len(small_tokenizer()), seed=7).save_pretrained(folder / ENCODER_FOLDER)
    return folder


def test_bfloat16_checkpoint_loads_as_float32(saved: Path) -> None:
    policy = Policy.load(str(saved))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.tokenizer.chat_template
    assert policy.frozen_encoder is None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", None])
def test_missing_folder_or_file_is_named(saved: Path, tmp_path: Path, missing: str | None) -> None:
    folder = tmp_path / "model"
    if missing is not None:
        shutil.copytree(saved, folder)
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"no policy at '.*model'") as caught:
        Policy.load(str(folder))
    assert "\n" not in str(caught.value)


def test_bad_arguments(saved: Path) -> None:
    for options, message in (({"pooling": "cls"}, "pooling='cls'"), ({"layer": 0}, "layer=0"), ({"encoder": "thawed"}, "encoder='thawed'")):
        with pytest.raises(ValueError, match=f"policy.*{message}"):
            Policy.load(str(saved), **options)  # type: ignore[arg-type]
    tokenizer = small_tokenizer()
    model = small_model(len(tokenizer))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(model, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Policy(small_model(len(tokenizer)), tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "eos", "max"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_embeddings_are_pooled_from_transformers_states(pooling: str, layer: int) -> None:
    policy = small_policy()
    policy.pooling, policy.layer = pooling, layer
    rollouts = some_rollouts(policy, rationale_lengths=(3, 17, 0, 8))
    expected = []
    for ids, start, end in zip(rollouts.input_ids, rollouts.text_starts.tolist(), rollouts.lengths.tolist(), strict=True):
        states = policy.model(input_ids=ids[None, :end], output_hidden_states=True).hidden_states[layer][0, start:]
        expected.append({"mean": states.mean(dim=0), "eos": states[-1], "max": states.max(dim=0).values}[pooling])
    torch.testing.assert_close(policy.embed(rollouts), torch.stack(expected), rtol=1e-4, atol=1e-5)
    # transformers' way of batching: padding on the left, an attention mask
    shifts = [rollouts.input_ids.shape[1] - end for end in rollouts.lengths.tolist()]
    left, real, pooled = (
        torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
        for rows in (rollouts.input_ids, rollouts.attention_mask, rollouts.pooling_mask)
    )
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    output = policy.model(input_ids=left, attention_mask=real.long(), position_ids=positions, output_hidden_states=True)
    torch.testing.assert_close(pool(output.hidden_states[layer], pooled, pooling), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_token_embeddings_can_be_frozen(tiny_policy_folder: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), train_embeddings=False)
    rollouts = some_rollouts(policy)
    policy.embed(rollouts).sum().backward()
    policy.logprobs(rollouts, policy.hidden_states(rollouts))[0].sum().backward()
    assert [name for name, p in policy.model.named_parameters() if p.grad is None] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("layer", [-1, -2])
def test_frozen_encoder_stays_when_live_model_changes(layer: int) -> None:
    live, frozen = small_policy("live"), small_policy("frozen")
    live.layer = frozen.layer = layer
    rollouts = some_rollouts(live)
    before = [policy.embed(rollouts).detach() for policy in (live, frozen)]
    torch.testing.assert_close(before[0], before[1])
    with torch.no_grad():
        for policy in (live, frozen):
            for parameter in policy.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(live.embed(rollouts), before[0], atol=1e-3)
    assert torch.equal(frozen.embed(rollouts), before[1])
    assert torch.equal(frozen.embed(rollouts, frozen.hidden_states(rollouts)), before[1])


def test_frozen_encoder_has_no_gradient_and_no_dropout() -> None:
    policy = small_policy("frozen", attention_dropout=0.5).train()
    rollouts = some_rollouts(policy)
    assert policy.frozen_encoder is not None
    assert not any(p.requires_grad for p in policy.frozen_encoder.parameters())
    assert torch.equal(policy.embed(rollouts), policy.embed(rollouts))


def test_exported_frozen_encoder_is_read_back(exported: Path) -> None:
    encoder = load_model(exported / ENCODER_FOLDER)
    policy = Policy.load(str(exported))
    rollouts = some_rollouts(policy)
    assert policy.frozen_encoder is not None
    expected = encoder.base_model(input_ids=rollouts.input_ids).last_hidden_state
    torch.testing.assert_close(policy.encoder_states(rollouts), expected)
    assert not torch.allclose(policy.hidden_states(rollouts), expected, atol=1e-2)


FROM_THE_HUB = """
import sys, torch
from src.modules.policy.model import Policy
assert Policy.load("someone/live").frozen_encoder is None
torch.save(Policy.load("someone/frozen").frozen_encoder.state_dict(), sys.argv[1])
"""


def frozen_on_the_hub(hub: Hub, home: Path, offline: bool) -> dict[str, torch.Tensor]:
    """Loads the frozen encoder of the hub's someone/frozen in another process; returns its weights."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FROM_THE_HUB, str(home / "found")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, torch.Tensor] = torch.load(home / "found", weights_only=True)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_frozen_encoder_on_the_hub_is_read_back(saved: Path, exported: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    expected = load_model(exported / ENCODER_FOLDER).base_model.state_dict()
    with local_hub({("someone/live", "0" * 40): contents(saved), ("someone/frozen", "1" * 40): contents(exported)}) as hub:
        asked = frozen_on_the_hub(hub, home, offline=False)
    for weights in (asked, frozen_on_the_hub(hub, home, offline=True)):  # then from the cache
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_evaluation_mode_restores_modes_after_an_error() -> None:
    policy = small_policy().train()
    policy.model.base_model.layers[0].eval()
    before = [part.training for part in policy.modules()]
    with pytest.raises(KeyError), evaluation_mode(policy):
        raise KeyError(policy.model.training, torch.is_grad_enabled())
    assert [part.training for part in policy.modules()] == before
    assert torch.is_grad_enabled()


def test_a_policy_switches_off_attention_that_plans_for_every_shape() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    small_policy()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
