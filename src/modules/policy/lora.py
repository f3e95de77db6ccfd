"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) by peft, put into a policy's transformers model in place.

The model keeps its class, so code that reads its states, its cache or its output layer does not change.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

_ADAPTER = "default"


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Puts adapters into a model and freezes all else; at first they change no output.

    Raises:
        ValueError: adapters on the embeddings or the output layer, which log-probs read as plain weights; `modules_to_save`,
            which an export would not merge.
    """
    if config.modules_to_save:
        raise ValueError(f"policy.lora.modules_to_save={list(config.modules_to_save)}: only adapters are trained here; leave it out")
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    inject_adapter_in_model(config, model, _ADAPTER)
    if ends != (model.get_input_embeddings(), model.get_output_embeddings()):
        raise ValueError("policy.lora.target_modules names the embeddings or the output layer; only the layers between them take adapters")


def has_lora(model: nn.Module) -> bool:
    """Returns whether a model has adapters."""
    return hasattr(model, "peft_config")


def lora_settings(model: nn.Module) -> dict[str, Any] | None:
    """Returns the adapters' LoraConfig as plain values, which `LoraConfig(**values)` reads; None without adapters."""
    if not has_lora(model):
        return None
    values = model.peft_config[_ADAPTER].to_dict()  # type: ignore[index, union-attr]
    values.pop("runtime_config", None)  # of the machine, not of the adapters
    plain: dict[str, Any] = json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}))
    return plain


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off, for passes without gradients."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy with the adapters merged into the weights; the model itself if it has none."""
    if not has_lora(model):
        return model
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    del plain.peft_config
    return plain
