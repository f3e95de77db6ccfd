import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.modules.encoder.export import export, load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import paper
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.engine import end_tokens
from src.modules.rollouts.hf import HFEngine
from src.utils.checkpoint_io import FolderCheckpoints
from tests.builders import quiet_trainer

SETTINGS = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=64, max_new_tokens=5)


def moved(policy: Policy) -> Policy:
    """The policy as if trained: other weights than its folder has."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return policy


def same_weights(left: Policy, right: Policy) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_transformers_loads_an_export(tiny_policy: Policy, tmp_path: Path) -> None:
    policy = moved(tiny_policy)
    folder = export(policy, SETTINGS, tmp_path / "run" / "export")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a graph", return_tensors="pt")["input_ids"]
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, policy.model(ids).logits)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert [path.name for path in folder.parent.iterdir()] == ["export"]  # nothing temporary is left


def test_policy_and_settings_round_trip(tiny_policy: Policy, tmp_path: Path) -> None:
    policy = moved(tiny_policy)
    loaded, settings = load_policy(export(policy, SETTINGS, tmp_path / "export"))
    assert settings == SETTINGS
    assert same_weights(loaded, policy)
    assert loaded.frozen_encoder is None


def test_float16_halves_the_file(tiny_policy: Policy, tmp_path: Path) -> None:
    half = export(tiny_policy, SETTINGS, tmp_path / "half", dtype=torch.float16) / "model.safetensors"
    full = export(tiny_policy, SETTINGS, tmp_path / "full") / "model.safetensors"
    assert half.stat().st_size < 0.6 * full.stat().st_size
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16
    assert {p.dtype for p in tiny_policy.parameters()} == {torch.float32}
    assert {p.dtype for p in load_policy(tmp_path / "half")[0].parameters()} == {torch.float32}


def test_frozen_encoder_is_exported(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = moved(Policy.load(str(tiny_policy_folder), encoder="frozen"))
    loaded, _ = load_policy(export(policy, SETTINGS, tmp_path / "export"))
    assert same_weights(loaded, policy)
    assert loaded.frozen_encoder is not None
    start = Policy.load(str(tiny_policy_folder)).model.base_model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in loaded.frozen_encoder.state_dict().items())


def test_export_replaces_an_older_one(tiny_policy: Policy, tmp_path: Path) -> None:
    export(tiny_policy, SETTINGS, tmp_path / "export")
    (tmp_path / "export" / "stale").touch()
    export(moved(tiny_policy), SETTINGS, tmp_path / "export")
    assert not (tmp_path / "export" / "stale").exists()
    assert same_weights(load_policy(tmp_path / "export")[0], tiny_policy)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def saved(policy: Policy, file: Path, *plugins: FolderCheckpoints) -> Path:
    """A checkpoint of training this policy."""
    module = GRACE(
        *(policy, HFEngine(SETTINGS.max_new_tokens), paper, Algorithm(grpo, ppo_clip), SETTINGS.instruction, SETTINGS.max_prompt_tokens)
    )
    trainer = quiet_trainer(plugins=plugins)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(file, weights_only=True)
    return file


def test_missing_or_foreign_checkpoints(tiny_policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: name an exported folder"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last.ckpt: training writes them to"):
        load_policy(tmp_path / "last.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken.ckpt cannot be read as a checkpoint"):
        load_policy(tmp_path / "broken.ckpt")
    files = {"../escaped": torch.zeros(1, dtype=torch.uint8)}
    for content, message in (
        ({}, r"other.ckpt is not a checkpoint of GRACE training"),
        ({"grace": {"policy_files": files, "settings": {}}}, "leads out of its folder"),
    ):
        torch.save({"state_dict": {}, **content}, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path / "other.ckpt")


@pytest.mark.parametrize("plugins", [[], [FolderCheckpoints()]], ids=["file", "folder"])
@pytest.mark.parametrize("encoder", ["live", "frozen"])
def test_checkpoint_needs_no_other_folder(tiny_policy_folder: Path, tmp_path: Path, encoder: str, plugins: list[FolderCheckpoints]) -> None:
    start = shutil.copytree(tiny_policy_folder, tmp_path / "start")
    policy = moved(Policy.load(str(start), encoder=encoder))  # type: ignore[arg-type]
    policy.model.generation_config.eos_token_id = [7, policy.tokenizer.eos_token_id]
    checkpoint = saved(policy, tmp_path / "last.ckpt", *plugins)
    shutil.rmtree(start)
    loaded, settings = load_policy(shutil.move(checkpoint, tmp_path / "elsewhere.ckpt"))
    assert settings == SETTINGS
    assert same_weights(loaded, policy)
    assert torch.equal(end_tokens(loaded), end_tokens(policy))
    prompts = PromptRenderer(policy.tokenizer, SETTINGS.instruction, 96)(["some text"])
    again = PromptRenderer(loaded.tokenizer, SETTINGS.instruction, 96)(["some text"])
    assert torch.equal(prompts.ids[0], again.ids[0])
    both = [HFEngine(6).generate(one, prompts, n=2, seed=3).embeddings for one in (policy.eval(), loaded)]
    torch.testing.assert_close(both[0], both[1], atol=0, rtol=0)


def test_weights_of_another_policy(tiny_policy: Policy, tmp_path: Path) -> None:
    del tiny_policy.model.base_model.layers[1]  # its config still says two
    with pytest.raises(ValueError, match=r"the weights in .*last.ckpt are not those of its own policy"):
        load_policy(saved(tiny_policy, tmp_path / "last.ckpt"))


def test_checkpoint_folder_with_slash(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = moved(Policy.load(str(tiny_policy_folder)))
    file = saved(policy, tmp_path / "last.ckpt", FolderCheckpoints())
    loaded, _ = load_policy(f"{file}/")
    assert same_weights(loaded, policy)
