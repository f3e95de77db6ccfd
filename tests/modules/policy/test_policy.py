import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.modules.policy.loading import load_model
from src.modules.policy.model import ENCODER_FOLDER, Policy
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


def test_weights_are_float32_whatever_the_checkpoint_holds(saved: Path) -> None:
    policy = Policy.load(str(saved))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.tokenizer.chat_template
    assert policy.frozen_encoder is None


def test_a_folder_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no policy at '.*nowhere': give policy.path") as caught:
        Policy.load(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_named(saved: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "half"
    shutil.copytree(saved, folder)
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"no policy at .*half"):
        Policy.load(str(folder))


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Policy(small_model(len(tokenizer)), tokenizer)


@torch.no_grad()
@pytest.mark.parametrize(("pooling", "layer"), [("mean", -1), ("eos", -1), ("max", -1), ("mean", -2), ("eos", -2), ("max", -2)])
def test_embeddings_are_pooled_from_transformers_own_states_under_either_padding_side(pooling: str, layer: int) -> None:
    policy = small_policy()
    policy.pooling, policy.layer = pooling, layer
    rollouts = some_rollouts(policy, rationale_lengths=(3, 17, 0, 8))
    expected = []
    for ids, start, end in zip(rollouts.input_ids, rollouts.text_starts.tolist(), rollouts.lengths.tolist(), strict=True):
        states = policy.model(input_ids=ids[None, :end], output_hidden_states=True).hidden_states[layer][0, start:]
        expected.append({"mean": states.mean(dim=0), "eos": states[-1], "max": states.max(dim=0).values}[pooling])
    torch.testing.assert_close(policy.embed(rollouts), torch.stack(expected), rtol=1e-4, atol=1e-5)
    # transformers' own way of batching: padding on the left, an attention mask
    longest = rollouts.input_ids.shape[1]
    shifts = [longest - end for end in rollouts.lengths.tolist()]
    left = torch.stack([ids.roll(shift) for ids, shift in zip(rollouts.input_ids, shifts, strict=True)])
    real, pooled = (
        torch.stack([mask.roll(shift) for mask, shift in zip(masks, shifts, strict=True)])
        for masks in (rollouts.attention_mask, rollouts.pooling_mask)
    )
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    output = policy.model(input_ids=left, attention_mask=real.long(), position_ids=positions, output_hidden_states=True)
    torch.testing.assert_close(pool(output.hidden_states[layer], pooled, pooling), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [({"pooling": "cls"}, "policy: pooling='cls'"), ({"layer": 0}, "policy: layer=0")])
def test_an_unknown_pooling_or_layer_is_refused(saved: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.load(str(saved), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_frozen_encoder_pools_the_same_layer(layer: int) -> None:
    live, frozen = small_policy("live"), small_policy("frozen")
    live.layer = frozen.layer = layer
    rollouts = some_rollouts(live)
    torch.testing.assert_close(live.embed(rollouts), frozen.embed(rollouts))


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy.encoder='thawed'"):
        small_policy(encoder="thawed")


@torch.no_grad()
def test_right_padding_does_not_change_hidden_states() -> None:
    policy = small_policy()
    rollouts = some_rollouts(policy, rationale_lengths=(3, 17, 0, 8))
    together = policy.hidden_states(rollouts)
    for i, length in enumerate(rollouts.lengths.tolist()):
        alone = policy.hidden_states(rollouts[i : i + 1])
        torch.testing.assert_close(together[i, :length], alone[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_the_models_own_last_layer() -> None:
    policy = small_policy()
    rollouts = some_rollouts(policy)
    own = policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long(), output_hidden_states=True)
    states, mask = policy.hidden_states(rollouts), rollouts.attention_mask
    torch.testing.assert_close(states[mask], own.hidden_states[-1][mask], rtol=1e-5, atol=1e-5)


def test_a_frozen_encoder_stays_put_when_the_live_model_changes() -> None:
    live, frozen = small_policy("live"), small_policy("frozen")
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


def test_a_frozen_encoder_is_not_trained_and_has_no_dropout() -> None:
    policy = small_policy("frozen", attention_dropout=0.5).train()
    rollouts = some_rollouts(policy)
    assert policy.model.training
    assert policy.frozen_encoder is not None
    assert not any(p.requires_grad for p in policy.frozen_encoder.parameters())
    assert torch.equal(policy.embed(rollouts), policy.embed(rollouts))


def test_live_embeddings_carry_a_gradient() -> None:
    policy = small_policy()
    policy.embed(some_rollouts(policy)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.model.base_model.parameters())


def test_an_exported_frozen_encoder_is_read_back(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(saved, folder)
    encoder = small_model(len(small_tokenizer()), seed=7)
    encoder.save_pretrained(folder / ENCODER_FOLDER)
    policy = Policy.load(str(folder))
    rollouts = some_rollouts(policy)
    assert policy.frozen_encoder is not None
    expected = encoder.base_model(input_ids=rollouts.input_ids).last_hidden_state
    torch.testing.assert_close(policy.embed(rollouts), policy.embed(rollouts, expected))
    torch.testing.assert_close(policy.frozen_encoder(input_ids=rollouts.input_ids).last_hidden_state, expected)
    assert not torch.allclose(policy.hidden_states(rollouts), expected, atol=1e-2)


FROM_THE_HUB = """
import sys, torch
from src.modules.policy.model import Policy
assert Policy.load("someone/live").frozen_encoder is None
torch.save(Policy.load("someone/frozen").frozen_encoder.state_dict(), sys.argv[1])
"""


def frozen_on_the_hub(hub: Hub, home: Path, offline: bool) -> dict[str, torch.Tensor]:
    """The weights of the frozen encoder of the hub's someone/frozen, as another process finds them."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FROM_THE_HUB, str(home / "found")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, torch.Tensor] = torch.load(home / "found", weights_only=True)
    return found


def test_a_frozen_encoder_on_the_hub_is_read_back(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "exported"))
    small_model(len(small_tokenizer()), seed=7).save_pretrained(folder / ENCODER_FOLDER)
    (tmp_path / "home").mkdir()
    models = {("someone/live", "0" * 40): contents(saved), ("someone/frozen", "1" * 40): contents(folder)}
    expected = load_model(folder / ENCODER_FOLDER).base_model.state_dict()
    with local_hub(models) as hub:
        asked = frozen_on_the_hub(hub, tmp_path / "home", offline=False)
    for weights in (asked, frozen_on_the_hub(hub, tmp_path / "home", offline=True)):  # then from what was copied
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    tokenizer = small_tokenizer()
    model = small_model(len(tokenizer))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(model, tokenizer)


def test_embeddings_can_be_held_while_the_rest_is_trained(tiny_policy_folder: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), train_embeddings=False)
    rollouts = some_rollouts(policy)
    policy.logprobs(rollouts, policy.hidden_states(rollouts))[0].sum().backward()
    assert [name for name, p in policy.model.named_parameters() if p.grad is None] == ["model.embed_tokens.weight"]
