"""Names for what an encoder computes: results and embeddings are kept under them, so two encoders that differ share none."""

import ast
import functools
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.modules.encoder.encoder import RationaleEncoder
from src.modules.policy.lora import lora_settings
from src.modules.policy.model import Policy
from src.modules.rollouts.engine import end_tokens

_MOVE_NOTHING = ("batch_tokens", "gpu_memory_utilization", "cpu_kv_cache_gib", "sleep", "tensor_parallel")  # settings of engines
_NAMES_ONLY = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}  # of configs: where from, not what
_LEFT_BY_CALLS = {"truncation", "padding"}  # of tokenizers: what the last call asked for


def weights_digest(policy: Policy) -> str:
    """Hexadecimal digest of every tensor of a policy, a frozen encoder's included; it changes with any of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(encoder: RationaleEncoder) -> dict[str, Any]:
    """Everything but the weights that moves an embedding, as plain values.

    The batch size does not: a text's embedding is the same in any company, greedy or sampled.
    """
    policy, engine = encoder.policy, encoder.engine
    settings: dict[str, Any] = encoder.settings.to_dict() | {"rationale": encoder.rationale}
    settings["code"] = code_digest(RationaleEncoder.__module__, type(engine).__module__)
    settings |= {"model": _config_of(policy.model.config), "lora": lora_settings(policy.model)}
    if policy.frozen_encoder is not None:
        settings["frozen_encoder"] = _config_of(policy.frozen_encoder.config)  # type: ignore[arg-type]
    settings |= {"tokenizer": _tokenizer_of(policy.tokenizer), "chat_template": policy.tokenizer.chat_template, "frames": frames(encoder)}
    device = policy.device.type
    settings["arithmetic"] = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as loaded"
    if encoder.rationale:
        settings |= {"temperature": encoder.temperature, "end_tokens": end_tokens(policy).tolist()}
        settings |= {"seed": encoder.seed} if encoder.temperature > 0 else {}
        settings |= {f"engine.{key}": value for key, value in vars(engine).items() if key not in _MOVE_NOTHING and _is_plain(value)}
        settings["engine"] = type(engine).__qualname__
    return settings


@functools.cache
def code_digest(*modules: str) -> str:
    """Hexadecimal digest of the files of these modules and of those of this project that they import, one after another.

    What was computed before a change of the prompt, the pooling or the sampling is then never taken for what comes after it;
    a change of a reward leaves it as it was.
    """
    files: dict[str, bytes] = {}
    found = list(modules)
    while found:
        name = found.pop()
        if name in files:
            continue
        file = _file_of(name)
        files[name] = file.read_bytes() if file else b""
        statements = [node for node in ast.walk(ast.parse(files[name])) if isinstance(node, ast.ImportFrom)]
        imported = ["." * node.level + (node.module or "") for node in statements]
        absolute = [importlib.util.resolve_name(module, name.rpartition(".")[0]) for module in imported]
        found += [module for module in absolute if module.startswith("src.")]
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}".encode() + content)
    return digest.hexdigest()


def _file_of(module: str) -> Path | None:
    if module in sys.modules:  # also of a script or a notebook, which may have none
        file = getattr(sys.modules[module], "__file__", None)
    else:
        spec = importlib.util.find_spec(module)
        file = spec.origin if spec else None
    return Path(file) if file else None


def frames(encoder: RationaleEncoder) -> dict[str, tuple[list[int], int]]:
    """By side the ids of the chat around no text, and how many of them stand before it.

    They say more than the chat template, which may write today's date.
    """
    # those that are in use: made now, they might show another date
    sides = {side or "none": renderer([""]) for side, renderer in encoder.renderers.items()}
    return {side: (frame.ids[0].tolist(), int(frame.text_starts[0])) for side, frame in sides.items()}


def _config_of(config: PretrainedConfig) -> Any:
    """What a model computes (epsilons, rotary frequencies, ...), without where it came from."""
    return _without(json.loads(config.to_json_string(use_diff=False)), _NAMES_ONLY)


def _without(value: Any, keys: set[str]) -> Any:
    """The same without these keys, in the configs within it too."""
    if isinstance(value, dict):
        return {key: _without(part, keys) for key, part in value.items() if key not in keys}
    return [_without(part, keys) for part in value] if isinstance(value, list) else value


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How text becomes ids: vocabulary, merges, normaliser and all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # one in Python has none
    if backend is None:
        return {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    return {key: part for key, part in json.loads(backend.to_str()).items() if key not in _LEFT_BY_CALLS}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | dict)


def mode(encoder: RationaleEncoder) -> str:
    """How rationales are written: `none`, `greedy` or `sampled`."""
    return "none" if not encoder.rationale else "greedy" if encoder.temperature == 0 else "sampled"


def revision(encoder: RationaleEncoder) -> str:
    """`<weights>-<settings>-<mode>`: changes with any weight and with every setting that moves an embedding."""
    settings = hashlib.sha256(json.dumps(settings_of(encoder), sort_keys=True).encode()).hexdigest()
    return f"{weights_digest(encoder.policy)[:16]}-{settings[:8]}-{mode(encoder)}"
