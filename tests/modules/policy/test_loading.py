"""Model folders with code, pickles and contradictions; dropout of a loaded model."""

import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.datamodules.prompt_limit import PromptLimit
from src.modules.encoder.export import export, load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.files import policy_files
from src.modules.policy.loading import set_attention_dropout
from src.modules.policy.model import ENCODER_FOLDER, Policy, has_dropout
from src.utils.checkpoint_io import CheckpointError
from tests.builders import small_policy, some_rollouts
from tests.conftest import Compose
from train import train


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def folder(tiny_policy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_policy_folder, tmp_path / "model"))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once hostile code has run."""
    return tmp_path / "ran"


def test_pickled_weights_are_not_read(tiny_policy_folder: Path, folder: Path, ran: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(ran)))
    for load in (Policy.load, load_policy):
        with pytest.raises(FileNotFoundError, match=r"its weights are a pickle \(pytorch_model\.bin\), which can run code") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)
    assert not ran.exists()
    with pytest.raises(pickle.UnpicklingError):  # torch's own guard, were it the only one
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert ran.exists()  # it would have worked
    ran.unlink()
    shutil.copy(tiny_policy_folder / "model.safetensors", folder)
    Policy.load(str(folder))  # beside safetensors it is not read
    assert not ran.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", f"{ENCODER_FOLDER}/pytorch_model.bin"])
def test_pickled_adapters_and_encoder_are_not_read(folder: Path, ran: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Touch(ran)))
    AutoConfig.from_pretrained(folder).save_pretrained((folder / name).parent)
    with pytest.raises(OSError, match=r"pickle|no file named model\.safetensors"):
        Policy.load(str(folder))
    assert not ran.exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\nfrom transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer\n"


def with_code(folder: Path, ran: Path, model_type: str) -> None:
    """A folder whose model, and its tokenizer, are Python files of its own."""
    classes = "class OwnConfig(Qwen2Config):\n    model_type = 'own'\nclass OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    classes += "class OwnTokenizer(Qwen2Tokenizer):\n    pass\n"
    (folder / "own.py").write_text(CODE.format(str(ran)) + classes)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    if model_type == "own":
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_model_code_runs_with_trust_alone(folder: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))  # not in the home
    monkeypatch.setattr(sys, "path", list(sys.path))
    with_code(folder, ran, "own")
    for load in (Policy.load, load_policy):
        with pytest.raises(ValueError, match=r"brings Python code of its own.*trust_remote_code=true") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="brings Python code of its own"):
        PromptLimit.load(str(folder), "Name the terms.", 60)
    assert not ran.exists()
    policy = Policy.load(str(folder), trust_remote_code=True)
    assert ran.exists()
    assert type(policy.model).__name__ == "OwnModel"


def test_code_replacing_a_known_model_does_not_run(folder: Path, ran: Path) -> None:
    with_code(folder, ran, "qwen2")
    assert type(Policy.load(str(folder)).model).__name__ == "Qwen2ForCausalLM"
    assert not ran.exists()


def test_trust_remote_code_reaches_training(compose: Compose, folder: Path, ran: Path) -> None:
    with_code(folder, ran, "own")
    cfg = compose(
        "logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1", "rollout.max_new_tokens=2"
    )
    cfg.policy.path, cfg.packages.train = str(folder), ["urllib3"]
    assert cfg.policy.trust_remote_code is False
    with pytest.raises(Exception, match="brings Python code of its own"):
        train(cfg)
    assert not ran.exists()
    assert compose("experiment=triplets_sup", "datamodule.path=x", "policy.trust_remote_code=true").datamodule.limit.trust_remote_code


def test_chat_template_cannot_reach_python(folder: Path, ran: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    (folder / "chat_template.jinja").write_text(reach + "{{ messages[-1].content }}")
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        PromptLimit.load(str(folder), "Name the terms.", 60)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["last.ckpt", "no_suffix"])
def test_checkpoint_runs_no_code(compose: Compose, tmp_path: Path, ran: Path, name: str) -> None:
    file = tmp_path / name
    torch.save({"state_dict": {}, "grace": Touch(ran)}, file)
    if name.endswith(".ckpt"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint") as caught:
            load_policy(file)
        assert "\n" not in str(caught.value)
    cfg = compose("logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1", f"ckpt_path={file}")
    cfg.packages.train = ["urllib3"]
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        train(cfg)
    assert not ran.exists()


def test_truncated_safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:20])
    with pytest.raises(ValueError, match="are no safetensors, or cut off"):
        Policy.load(str(folder))


@pytest.mark.parametrize("written", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.9}])
def test_contradictory_generation_config_is_savable(
    folder: Path, tmp_path: Path, written: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "generation_config.json"
    ends = {"eos_token_id": [1, 2], "pad_token_id": 0}
    file.write_text(json.dumps({**written, **ends}))
    with caplog.at_level(logging.WARNING):
        policy, settings = load_policy(str(folder))
    assert "generation_config.json contradicts itself" in caplog.text
    assert "generation_config.json" in policy_files(policy)
    again, _ = load_policy(export(policy, settings, tmp_path / "export"))
    assert {name: getattr(again.model.generation_config, name) for name in ends} == ends


def test_attention_dropout_acts_in_training_alone(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), attention_dropout=0.3)
    rollouts = some_rollouts(policy)
    assert torch.equal(policy.embed(rollouts), policy.embed(rollouts))  # not yet in training
    policy.train()
    assert not torch.allclose(policy.embed(rollouts), policy.embed(rollouts), atol=1e-3)
    assert Policy.load(str(export(policy, EncoderSettings(), tmp_path / "export"))).model.config.attention_dropout == 0.0


def test_bad_attention_dropout() -> None:
    for model, share, message in ((small_policy(), -0.1, "=-0.1"), (small_policy(), 1.0, "=1.0"), (nn.Linear(2, 2), 0.1, "Linear has no")):
        with pytest.raises(ValueError, match=f"policy.attention_dropout.*{message}"):
            set_attention_dropout(model, share)


@pytest.mark.parametrize(
    ("attention", "lora", "expected"), [(None, None, False), (0.0, 0.0, False), (0.1, None, True), (None, 0.1, True), (0.1, 0.0, True)]
)
def test_has_dropout(tiny_policy_folder: Path, attention: float | None, lora: float | None, expected: bool) -> None:
    adapters = None if lora is None else LoraConfig(r=2, lora_dropout=lora, target_modules="all-linear")
    policy = Policy.load(str(tiny_policy_folder), attention_dropout=attention, lora=adapters)
    before, modes = torch.get_rng_state(), [module.training for module in policy.modules()]
    assert has_dropout(policy, some_rollouts(policy)) == expected
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("added", "special", "message"),
    [
        ("ophthalmology", False, r"'ophthalmology' the id \d+, .* has 320 rows"),
        ("<|pad|>", True, None),
        ("<|never|>", True, None),
    ],
)
def test_tokens_without_a_row(folder: Path, added: str, special: bool, message: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([added], special_tokens=special)
    tokenizer.save_pretrained(folder)
    if message is None:  # it has a row, or no text makes it
        assert Policy.load(str(folder)).head.shape[0] == 320
    else:
        with pytest.raises(ValueError, match=message):
            Policy.load(str(folder))


def test_template_token_without_a_row(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'<\|turn\|>' the id \d+, .* has 320 rows"):
        Policy.load(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(328)  # more than enough
    model.save_pretrained(folder)
    assert len(Policy.load(str(folder)).head) == 1 + tokenizer.convert_tokens_to_ids("<|turn|>")
