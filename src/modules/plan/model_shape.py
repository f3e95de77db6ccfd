"""What memory depends on of a model, from its config alone: no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from src.modules.policy.lora import add_lora
from src.modules.policy.packaged import local_path


@dataclass(frozen=True)
class Shape:
    """Numbers of a causal language model.

    Attributes:
        parameters: all of them, a tied one once, adapters included.
        trained: those with gradients.
        embedding: of the token embeddings, V * D.
        head_trained: whether the output layer has gradients.
        layer: of one layer.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in its config.
    """

    parameters: int
    trained: int
    embedding: int
    head_trained: bool
    layer: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


def find_config(path: str, shapes: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder, of a published backbone, or of a model on the hub.

    Args:
        path: a folder, or a name.
        shapes: the table of published backbones.

    Raises:
        FileNotFoundError: none of them.
    """
    published: dict[str, dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(shapes))  # type: ignore[assignment]
    if path in published:
        return AutoConfig.for_model(**published[path])
    folder = local_path(path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"no config.json for {path!r}: give policy.path a folder that has one (it alone is enough for dry_run), a name of {shapes}, or "
            f"a hub name on a machine that reaches the hub ({str(error).splitlines()[0]})"
        ) from error


def shape_of(config: PreTrainedConfig, train_embeddings: bool = True, lora: LoraConfig | None = None) -> Shape:
    """Counts the parameters of a model that is built without memory for them."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    model.get_input_embeddings().requires_grad_(train_embeddings)
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora)
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        parameters=_count(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embedding=_count(model.get_input_embeddings()),
        head_trained=model.get_output_embeddings().weight.requires_grad,
        layer=_count(model.base_model.layers[0]),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
