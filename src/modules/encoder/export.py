"""Policies to folders that ordinary tools load, and back: from such a folder, from the hub, from a training checkpoint."""

import copy
import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from src.modules.encoder.sentence_transformers_files import write_sentence_transformers_files
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.files import policy_of
from src.modules.policy.lora import merged
from src.modules.policy.model import ENCODER_FOLDER, Policy
from src.modules.policy.packaged import local_path
from src.utils.checkpoint_io import read_checkpoint

CHECKPOINT_SUFFIX = ".ckpt"
_PREFIX = "policy."  # of the policy's weights in the state dict of a LightningModule


def export(policy: Policy, settings: EncoderSettings, folder: Path | str, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`, `AutoTokenizer.from_pretrained`, `SentenceTransformer` and
    `RationaleEncoder.from_pretrained`.

    LoRA adapters are merged into the weights. It also holds grace.json (prompt and pooling) and, for a policy whose encoder
    is frozen, `encoder/`, a model of the same kind. It is written aside and renamed: it is whole or not there. What stood in
    its place is replaced.

    Args:
        dtype: of the weights on disk; the policy itself is left alone. Float16 halves the folder.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    model = merged(policy.model)
    _save_model(model, partial, dtype)
    policy.tokenizer.save_pretrained(partial)
    settings.save(partial)
    write_sentence_transformers_files(partial, settings, int(model.config.get_text_config().hidden_size))
    if policy.frozen_encoder is not None:
        # saved whole, output layer and all, for a bare encoder would load with a random one and a warning about it
        whole = copy.deepcopy(model)
        whole.base_model.load_state_dict(policy.frozen_encoder.state_dict())
        _save_model(whole, partial / ENCODER_FOLDER, dtype)
    if folder.exists():
        replaced = folder.with_name(f"{folder.name}.{os.getpid()}.old")
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)
    return folder


def _save_model(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder)  # type: ignore[operator]


def load_policy(path: Path | str, trust_remote_code: bool = False) -> tuple[Policy, EncoderSettings]:
    """The policy of an exported folder, of the hub, or of a training checkpoint (*.ckpt, a folder or a file), with its encoder's settings.

    Without settings (any instruct model) they are the paper's. The weights are float32. `trust_remote_code` lets Python
    files that come with a model run.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a checkpoint that is not whole, or that GRACE did not write.
    """
    path = str(path)
    if Path(path).suffix == CHECKPOINT_SUFFIX:
        return _load_checkpoint(Path(path), trust_remote_code)
    is_folder_name = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1  # no hub name looks like that
    if is_folder_name and not Path(path).is_dir():
        raise FileNotFoundError(
            f"no model at {path}: name an exported folder (`python train.py` leaves one in outputs/<run>/<time>/export), "
            "a training checkpoint (*.ckpt) or a model on the hub"
        )
    settings = EncoderSettings.load(local_path(path))
    return Policy.load(path, pooling=settings.pooling, layer=settings.layer, trust_remote_code=trust_remote_code), settings


def _load_checkpoint(file: Path, trust_remote_code: bool) -> tuple[Policy, EncoderSettings]:
    checkpoint = read_checkpoint(file, mapped=True)
    grace = checkpoint.get("grace", {})
    if "policy_files" not in grace:
        raise ValueError(f"{file} is not a checkpoint of GRACE training: it does not say which policy its weights belong to")
    settings = EncoderSettings.from_dict(grace["settings"], str(file))
    lora = LoraConfig(**grace["lora"]) if grace["lora"] else None
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(_PREFIX)}
    how = (grace["policy_path"], grace["encoder"], settings.pooling, settings.layer, lora, trust_remote_code)
    try:
        return policy_of(grace["policy_files"], weights, *how), settings
    except RuntimeError as error:
        raise ValueError(f"the weights in {file} are not those of its own policy: {error}") from error
