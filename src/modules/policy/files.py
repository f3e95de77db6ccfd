"""A policy's small files (config, generation config, tokenizer) inside a checkpoint, so that it needs no other folder."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from src.modules.policy.loading import load_tokenizer
from src.modules.policy.lora import add_lora
from src.modules.policy.model import Policy
from src.modules.policy.pooling import PoolingName

_packed: "WeakKeyDictionary[Policy, dict[str, Tensor]]" = WeakKeyDictionary()


def policy_files(policy: Policy) -> dict[str, Tensor]:
    """The files by name, each as [bytes] uint8, which weights-only loading reads; made once a policy, as nothing changes them."""
    if policy not in _packed:
        with TemporaryDirectory() as folder:
            policy.tokenizer.save_pretrained(folder)
            policy.model.config.save_pretrained(folder)
            if policy.model.generation_config is not None:
                policy.model.generation_config.save_pretrained(folder)
            files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
            _packed[policy] = {
                str(file.relative_to(folder)): torch.from_numpy(np.frombuffer(file.read_bytes(), dtype=np.uint8).copy()) for file in files
            }
    return _packed[policy]


def policy_of(
    files: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    path: str,
    encoder: str,
    pooling: PoolingName,
    layer: int,
    lora: LoraConfig | None,
    trust_remote_code: bool = False,
) -> Policy:
    """The policy of such files and of its weights, in float32.

    Args:
        weights: its state dict.
        path: what it is called.
        encoder, pooling, layer, lora: see Policy.
        trust_remote_code: lets Python files run that came with the model; they are not among `files`, but at `path`.

    Raises:
        RuntimeError: weights of another policy.
        ValueError: a file whose name leads out of its folder.
    """
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            file = Path(folder, name)
            if not file.resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"the checkpoint holds a file named {name!r}, which leads out of its folder")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.numpy().tobytes())
        origin = path if trust_remote_code else folder
        tokenizer = load_tokenizer(origin, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code)
        how = {"dtype": torch.float32, "attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
        with no_init_weights():  # all are loaded below
            model = AutoModelForCausalLM.from_config(config, **how)
        if Path(folder, "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    model.name_or_path = path
    policy = Policy(model, tokenizer, encoder, pooling, layer)  # type: ignore[arg-type]  # checked there
    if lora is not None:
        add_lora(model, lora)
    policy.load_state_dict(dict(weights))
    return policy
