"""Names for what an encoder computes: results and embeddings are kept under them, so two encoders that differ share none."""

import hashlib
import json
from typing import Any

import torch

from src.modules.encoder import RationaleEncoder
from src.modules.policy import Policy

_FORMAT = 1  # raise when a change of the code moves embeddings
_MOVE_NOTHING = ("batch_size", "gpu_memory_utilization", "cpu_kv_cache_gib", "sleep", "tensor_parallel")  # settings of engines


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
    settings: dict[str, Any] = encoder.settings.to_dict() | {"format": _FORMAT, "rationale": encoder.rationale}
    settings |= {"chat_template": policy.tokenizer.chat_template, "vocabulary": policy.tokenizer.get_vocab()}
    device = policy.device.type
    settings["arithmetic"] = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as loaded"
    if encoder.rationale:
        settings["temperature"] = encoder.temperature
        settings |= {"seed": encoder.seed} if encoder.temperature > 0 else {}
        settings |= {f"engine.{key}": value for key, value in vars(engine).items() if key not in _MOVE_NOTHING and _is_plain(value)}
        settings["engine"] = type(engine).__qualname__
    return settings


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | dict)


def mode(encoder: RationaleEncoder) -> str:
    """How rationales are written: `none`, `greedy` or `sampled`."""
    return "none" if not encoder.rationale else "greedy" if encoder.temperature == 0 else "sampled"


def revision(encoder: RationaleEncoder) -> str:
    """`<weights>-<settings>-<mode>`: changes with any weight and with every setting that moves an embedding."""
    settings = hashlib.sha256(json.dumps(settings_of(encoder), sort_keys=True).encode()).hexdigest()
    return f"{weights_digest(encoder.policy)[:16]}-{settings[:8]}-{mode(encoder)}"
