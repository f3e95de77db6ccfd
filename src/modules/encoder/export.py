"""Policies to folders that ordinary tools load, and back: from such a folder, from the hub, from a training checkpoint."""

import copy
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from src.modules.encoder.card import TrainingFacts, write_card
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.loading import load_tokenizer
from src.modules.policy.lora import add_lora, merged
from src.modules.policy.model import ENCODER_FOLDER, Policy
from src.modules.policy.packaged import local_path
from src.utils.checkpoint_io import read_checkpoint

CHECKPOINT_SUFFIX = ".ckpt"
_PREFIX = "policy."  # of the policy's weights in the state dict of a LightningModule
_MODULE = "rationale_transformer"
_MODES = {"mean": "mean", "max": "max", "eos": "lasttoken"}  # sentence-transformers' names of the poolings


def export(
    policy: Policy,
    settings: EncoderSettings,
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    facts: TrainingFacts = TrainingFacts(),  # noqa: B008  # frozen
) -> Path:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`, `AutoTokenizer.from_pretrained`, `SentenceTransformer` and
    `RationaleEncoder.from_pretrained`, and returns it.

    LoRA adapters are merged into the weights. It also holds grace.json (prompt and pooling), a model card and, for a policy with a
    frozen encoder, `encoder/`, a model of the same kind. It is written under another name and renamed, so it is never incomplete;
    a folder in its place is replaced.

    Args:
        dtype: of the weights on disk; the policy itself does not change. Float16 halves the folder.
        facts: of the training, for the card.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.with_name(f"{folder.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    model = merged(policy.model)
    _save_model(model, partial, dtype)
    policy.tokenizer.save_pretrained(partial)
    settings.save(partial)
    dimension = int(model.config.get_text_config().hidden_size)
    _save_sentence_transformers_files(partial, settings, dimension)
    write_card(partial, policy.path, dimension, settings, facts)
    if policy.frozen_encoder is not None:
        # saved with an output layer: a bare encoder would load with a random one and a warning about it
        encoder = copy.deepcopy(model)
        encoder.base_model.load_state_dict(policy.frozen_encoder.state_dict())
        _save_model(encoder, partial / ENCODER_FOLDER, dtype)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    if replaced.exists():
        shutil.rmtree(replaced)
    return folder


def _save_model(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder)  # type: ignore[operator]


def _save_sentence_transformers_files(folder: Path, settings: EncoderSettings, dimension: int) -> None:
    """Writes modules.json and the files that it names, beside weights, tokenizer and grace.json.

    The first module is a copy of this project's source, with its imports: no module of the library can leave the chat's
    beginning out of the pooling and still end the chat behind the text. So loading needs `trust_remote_code=True`. The
    second is the library's Pooling. The vectors are those of `RationaleEncoder`: pooled, not normalised.
    """
    here = Path(__file__).parent
    for name in ("renderer.py", "plain_text.py"):
        shutil.copyfile(here.parent / "prompt" / name, folder / name)
    source = (here / f"{_MODULE}.py").read_text(encoding="utf-8")
    # transformers looks for a relatively imported file beside the one that imports it, and nowhere else
    (folder / f"{_MODULE}.py").write_text(source.replace("from ..prompt.renderer", "from .renderer"), encoding="utf-8")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULE}.RationaleTransformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.Pooling"},
    ]
    config = {
        "model_type": "SentenceTransformer",
        "__version__": {name.replace("-", "_"): metadata.version(name) for name in ("sentence-transformers", "transformers")}
        | {"pytorch": torch.__version__},
        "requirements": {"sentence-transformers": ">=6"},
        "prompts": {side: settings.instruction_for(side) for side in ("query", "document")},  # else the document's
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    pooling = {"embedding_dimension": dimension, "pooling_mode": _MODES[settings.pooling], "include_prompt": False}
    (folder / "1_Pooling").mkdir()
    files = {"modules.json": modules, "config_sentence_transformers.json": config, "1_Pooling/config.json": pooling}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_policy(path: Path | str, trust_remote_code: bool = False) -> tuple[Policy, EncoderSettings]:
    """Loads the policy of an exported folder, of the hub, or of a training checkpoint (*.ckpt), and its encoder's settings.

    Without settings (any instruct model) they are the paper's. The weights are float32 and not to be trained. `trust_remote_code` lets
    Python files that come with a model run.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a checkpoint that is incomplete, or that GRACE did not write.
    """
    path = str(path)
    if Path(path).suffix == CHECKPOINT_SUFFIX:
        policy, settings = _load_checkpoint(Path(path), trust_remote_code)
        return policy.requires_grad_(False), settings
    is_folder_name = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1  # no hub name looks like that
    if is_folder_name and not Path(path).is_dir():
        raise FileNotFoundError(
            f"no model at {path}: name an exported folder (`python train.py` leaves one in outputs/<run>/<time>/export), "
            "a training checkpoint (*.ckpt) or a model on the hub"
        )
    settings = EncoderSettings.load(local_path(path))
    policy = Policy.load(path, pooling=settings.pooling, layer=settings.layer, trust_remote_code=trust_remote_code)
    return policy.requires_grad_(False), settings


def _load_checkpoint(file: Path, trust_remote_code: bool) -> tuple[Policy, EncoderSettings]:
    """Builds the policy of a checkpoint from its small files (see `policy_files`) and weights."""
    checkpoint = read_checkpoint(file)
    grace = checkpoint.get("grace", {})
    if "policy_files" not in grace:
        raise ValueError(f"{file} is not a checkpoint of GRACE training: it does not say which policy its weights belong to")
    settings = EncoderSettings.from_dict(grace["settings"], str(file))
    with TemporaryDirectory() as folder:
        for name, content in grace["policy_files"].items():
            small = Path(folder, name)
            if not small.resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"{file} holds a file named {name!r}, which leads out of its folder")
            small.parent.mkdir(parents=True, exist_ok=True)
            small.write_bytes(content.numpy().tobytes())
        origin = grace["policy_path"] if trust_remote_code else folder  # a model's Python files are not in the checkpoint
        tokenizer = load_tokenizer(origin, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
        with no_init_weights():  # all are loaded below
            model = AutoModelForCausalLM.from_config(config, **options)
        if Path(folder, "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    model.name_or_path = grace["policy_path"]
    policy = Policy(model, tokenizer, grace["encoder"], settings.pooling, settings.layer)
    if grace["lora"]:
        add_lora(model, LoraConfig(**grace["lora"]))
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(_PREFIX)}
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {file} are not those of its own policy: {error}") from error
    return policy, settings
