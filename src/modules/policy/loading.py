"""Models and tokenizers from a folder or the hub, and a policy's small files for a checkpoint.

None of a model's Python code runs unless `trust_remote_code` is set, and no pickle is read.
"""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.modules.policy.packaged import local_path
from src.modules.prompt.plain_text import control_tokens
from src.utils.plain_errors import HUB_ERRORS, reason

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle")


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or of a model on the hub.

    Raises:
        OSError: there is none.
        ValueError: it brings Python code, without `trust_remote_code`.
    """
    try:
        return AutoTokenizer.from_pretrained(local_path(path), revision=revision, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise _plain(error, path) from error


def load_model(
    path: Path | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    subfolder: str = "",
) -> PreTrainedModel:
    """Loads the causal language model of a folder or of the hub, in float32, from safetensors alone.

    Raises:
        OSError: there is none, or its weights are not in safetensors.
        ValueError: it brings Python code, without `trust_remote_code`; or its weights cannot be read.
    """
    settings: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "trust_remote_code": trust_remote_code}
    settings |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model = AutoModelForCausalLM.from_pretrained(local_path(str(path)), dtype=torch.float32, use_safetensors=True, **settings)
    except ValueError as error:
        raise _plain(error, path) from error
    except SafetensorError as error:
        raise ValueError(f"the weights at {str(path)!r} are no safetensors, or cut off ({error}): copy the folder again") from error
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # a temperature without sampling: transformers reads that, and would not write it into a checkpoint
        log.warning("%s: its generation_config.json contradicts itself; its sampling settings are not saved", path)
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)
    return model


def find_model(path: str, revision: str | None = None) -> None:
    """Looks for a model in a folder or, by its config alone, on the hub.

    Raises:
        FileNotFoundError: there is none, or the folder is no model's (see `require_files`).
    """
    folder = local_path(path)
    require_files(folder)
    if Path(folder).is_dir():
        return
    try:
        if not _is_hub_name(path):
            raise OSError("no such folder")
        # transformers would retry for half a minute; the card is there for its licence
        snapshot_download(path, revision=revision, allow_patterns=["config.json", "README.md"])
    except HUB_ERRORS as error:
        raise not_found(path, error) from error


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def not_found(path: str, error: Exception) -> FileNotFoundError:
    """Returns an error of one line: why there is no model at `path`, what to download, and where to put it."""
    why = reason(error)
    if not _is_hub_name(path):
        return FileNotFoundError(f"no policy at {path!r}: give policy.path a folder with config.json, weights and tokenizer ({why})")
    return FileNotFoundError(
        f"no policy at {path!r}: no such folder, and none from the hub ({why}); where the hub is in reach, "
        f"`hf download {path} --local-dir {path.split('/')[1]}`, copy that folder here, and give its path (policy.path=<the folder>)"
    )


def require_files(path: str) -> None:
    """Checks a local folder before transformers reads it: it would make an empty tokenizer without an error.

    Raises FileNotFoundError if it has no config, no tokenizer, or weights in a pickle alone; or if it holds adapters without their model.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    weights = [file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    if (folder / "adapter_config.json").is_file() and not weights:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise FileNotFoundError(
            f"no policy at {path!r}: it is a LoRA adapter of {base!r} (adapter_config.json); merge the two and name the folder that this "
            f"writes: python -m src.modules.policy.merge_adapter {shlex.quote(path)} {shlex.quote(path.rstrip('/') + '-merged')}"
        )
    for needed in (("config.json",), _TOKENIZER_FILES):
        if not any((folder / name).is_file() for name in needed):
            raise FileNotFoundError(f"no policy at {path!r}: the folder has no {needed[0]}; save model and tokenizer into the same folder")
    for kind in ("adapter_model", ""):  # where a folder has both, transformers reads the safetensors
        pickles = sorted(file.name for pattern in _PICKLES if pattern.startswith(kind) for file in folder.glob(pattern))
        if pickles and not any(folder.glob(f"{kind}*.safetensors")):
            raise FileNotFoundError(
                f"no policy at {path!r}: its weights are a pickle ({pickles[0]}), which can run code when it is read; where you "
                "trust it, load it with transformers once and save_pretrained() it, which writes safetensors"
            )


def require_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path | str) -> None:
    """Raises ValueError if a token that a prompt or a rationale can hold has no row in the embedding.

    Control tokens that no chat shows may lack one: no text makes them.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    template = str(tokenizer.chat_template)
    named = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token if "bos_token" in template else None}
    met = beyond.keys() - {token for token in control_tokens(tokenizer) if token not in template and token not in named}
    if met:
        last = max(met, key=lambda token: beyond[token])
        raise ValueError(
            f"the tokenizer of {str(path)!r} gives {last!r} the id {beyond[last]}, and the model's embedding has {rows} rows: load the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings and save both"
        )


def _plain(error: ValueError, path: Path | str) -> ValueError:
    if "trust_remote_code" not in str(error):
        return error
    return ValueError(
        f"the model at {str(path)!r} brings Python code of its own, which would run here: read that code, and if you trust it set "
        "trust_remote_code=true (policy.trust_remote_code=true in training)"
    )


def set_attention_dropout(model: nn.Module, share: float) -> None:
    """Sets the share of attention weights that is dropped in training; the model's config, and so an export, keeps its own.

    Raises ValueError if `share` is not in [0, 1), or no layer of the model has such a setting.
    """
    if not 0 <= share < 1:
        raise ValueError(f"policy.attention_dropout={share}: it is a share, 0 or above and below 1")
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if not layers:
        raise ValueError(f"policy.attention_dropout={share}: {type(model).__name__} has no attention_dropout to set; use a model that has")
    for layer in layers:
        layer.attention_dropout = share  # type: ignore[assignment]
