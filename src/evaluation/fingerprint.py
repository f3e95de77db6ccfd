"""Keys of encoders: results and embeddings are stored under them, so encoders that compute other embeddings share none."""

import hashlib
import json
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import RationaleFor
from src.modules.policy.lora import lora_settings
from src.modules.policy.model import Policy
from src.modules.rollouts.engine import end_tokens

EMBEDDING_VERSION = 1
"""Raise it with every change of the prompt, the pooling or the sampling that changes what an encoder computes from the same weights and
settings. Stored results and embeddings of earlier versions are then not used."""

_NO_EFFECT = (  # engine settings
    *("batch_tokens", "cuda_graphs", "cast_weights"),
    *("gpu_memory_utilization", "cpu_kv_cache_gib", "sleep", "tensor_parallel"),
)
_ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}  # entries of configs
_LEFT_BY_CALLS = {"truncation", "padding"}  # entries of tokenizers that the last call set


def revision(encoder: RationaleEncoder, rationale: RationaleFor | None = None, weights: str | None = None) -> str:
    """Returns `<weights>-<settings>-<mode>`, which changes with every weight and setting that changes an embedding.

    Args:
        rationale: in place of the encoder's.
        weights: their digest, where it is known.
    """
    rationale = rationale or encoder.rationale
    settings = hashlib.sha256(json.dumps(settings_of(encoder, rationale), sort_keys=True).encode()).hexdigest()
    return f"{(weights or weights_digest(encoder.policy))[:16]}-{settings[:8]}-{mode(encoder, rationale)}"


def mode(encoder: RationaleEncoder, rationale: RationaleFor) -> str:
    """Returns `none`, `greedy` or `sampled`: how rationales are generated; with `-query` or `-document`, if only for those."""
    if rationale == "none":
        return rationale
    return ("greedy" if encoder.temperature == 0 else "sampled") + ("" if rationale == "both" else f"-{rationale}")


def weights_digest(policy: Policy) -> str:
    """Returns the hexadecimal digest of every tensor of a policy, a frozen encoder's included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(encoder: RationaleEncoder, rationale: RationaleFor) -> dict[str, Any]:
    """Returns everything but the weights that changes an embedding, as plain values.

    Budgets of tokens do not: a text's embedding is the same in any batch, greedy or sampled.
    """
    policy, engine = encoder.policy, encoder.engine
    settings: dict[str, Any] = {"version": EMBEDDING_VERSION, **encoder.settings.to_dict(), "rationale": rationale}
    settings |= {"model": _config_of(policy.model.config), "lora": lora_settings(policy.model)}
    if policy.frozen_encoder is not None:
        settings["frozen_encoder"] = _config_of(policy.frozen_encoder.config)  # type: ignore[arg-type]
    # the ids of the chat around no text say more than the template, which may write today's date
    prompts = {role or "none": renderer([""]) for role, renderer in encoder.renderers.items()}
    settings["prompts"] = {role: (prompt.ids[0].tolist(), int(prompt.text_starts[0])) for role, prompt in prompts.items()}
    settings |= {"tokenizer": _tokenizer_of(policy.tokenizer), "chat_template": policy.tokenizer.chat_template}
    settings["autocast"] = "torch.bfloat16" if encoder.bf16 else None
    if rationale != "none":
        settings |= {"temperature": encoder.temperature, "end_tokens": end_tokens(policy).tolist()}
        settings |= {"seed": encoder.seed} if encoder.temperature > 0 else {}
        plain = {key: value for key, value in vars(engine).items() if isinstance(value, int | float | str | bool | dict)}
        settings |= {f"engine.{key}": value for key, value in plain.items() if key not in _NO_EFFECT}
        settings["engine"] = type(engine).__qualname__
    return settings


def _config_of(config: PretrainedConfig) -> Any:
    """Returns what a model computes (epsilons, rotary frequencies, ...) without where it came from."""
    return _without(json.loads(config.to_json_string(use_diff=False)), _ORIGIN)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, keys) for key, part in value.items() if key not in keys}
    return [_without(part, keys) for part in value] if isinstance(value, list) else value


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what turns text into ids: vocabulary, merges, normaliser."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer in Python has none
    if backend is None:
        return {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    return {key: part for key, part in json.loads(backend.to_str()).items() if key not in _LEFT_BY_CALLS}
