"""Models and tokenizers from a folder or the hub: no code of theirs runs and no pickle is read, unless asked for by name."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.modules.policy.packaged import local_path

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"]
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle")


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub.

    Args:
        trust_remote_code: lets Python files that come with it run.

    Raises:
        OSError: there is none.
        ValueError: it brings code, and that was not asked for.
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
    """The causal language model of a folder or of the hub, in float32, from safetensors alone; arguments and errors as above.

    Args:
        subfolder: where it lies in there.

    Raises:
        OSError: there is none, or its weights are not in safetensors.
        ValueError: it brings code, and that was not asked for; or its weights cannot be read.
    """
    settings: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "trust_remote_code": trust_remote_code}
    settings |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model = AutoModelForCausalLM.from_pretrained(local_path(str(path)), dtype=torch.float32, use_safetensors=True, **settings)
    except ValueError as error:
        raise _plain(error, path) from error
    except SafetensorError as error:
        raise ValueError(f"the weights at {str(path)!r} are no safetensors, or cut off ({error}): copy the folder again") from error
    _make_savable(model, path)
    return model


def _make_savable(model: PreTrainedModel, path: Path | str) -> None:
    """Some folders ask for a temperature and not for sampling: transformers reads that, and would not write it into a checkpoint."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        log.warning("%s: its generation_config.json contradicts itself; what it says of sampling is left out of what is saved", path)
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)


def require_files(path: str) -> None:
    """Refuses a local folder without a config, a tokenizer (transformers would make an empty one in silence) or safetensors.

    Raises:
        FileNotFoundError: it lacks one.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for needed in (["config.json"], _TOKENIZER_FILES):
        if not any((folder / name).is_file() for name in needed):
            raise FileNotFoundError(f"no policy at {path!r}: the folder has no {needed[0]}; save model and tokenizer into the same folder")
    _refuse_pickles(folder)


def _refuse_pickles(folder: Path) -> None:
    """Where a folder has both, transformers reads the safetensors."""
    for kind in ("adapter_model", ""):
        pickles = sorted(file.name for pattern in _PICKLES if pattern.startswith(kind) for file in folder.glob(pattern))
        if pickles and not any(folder.glob(f"{kind}*.safetensors")):
            raise FileNotFoundError(
                f"no policy at {str(folder)!r}: its weights are a pickle ({pickles[0]}), which can run code when it is read; where you "
                "trust it, load it with transformers once and save_pretrained() it, which writes safetensors"
            )


def _plain(error: ValueError, path: Path | str) -> ValueError:
    if "trust_remote_code" not in str(error):
        return error
    return ValueError(
        f"the model at {str(path)!r} brings Python code of its own, which would run here: read that code, and if you trust it set "
        "trust_remote_code=true (policy.trust_remote_code=true in training)"
    )
