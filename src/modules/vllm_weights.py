"""The trainer's weights under the names of a plain checkpoint, and how they get into a vLLM engine in this process."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of peft's wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its name in a checkpoint of the model without adapters; tied ones under the first name.

    LoRA layers of peft are merged into copies, one at a time: merged in place and taken back out, the frozen weights
    would move by a rounding error at every rollout batch.
    """
    lasting = {id(weight) for weight in model.parameters()}  # a merged copy is gone soon, and its id then another's
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        plain = _without_adapter(module)
        for name, weight in plain.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            if id(weight) in lasting:
                seen.add(id(weight))
            yield prefix + name, weight.detach()
        for name, child in plain.named_children():
            yield from walk(child, f"{prefix}{name}.")

    return walk(plain_model(model), "")


def _without_adapter(module: nn.Module) -> nn.Module:
    """The layer that computes what a layer of peft computes; any other module is itself."""
    if hasattr(module, "base_layer") and hasattr(module, "merge"):
        layer: Any = copy.deepcopy(module)
        if not layer.disable_adapters:
            layer.merge()
        return layer.get_base_layer()
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # trained whole beside the adapters
        saved: Any = module
        return saved.original_module if saved.disable_adapters else saved.modules_to_save[saved.active_adapters[0]]
    return module


def push(llm: Any, model: nn.Module) -> None:
    """Copies the weights of a model into a `vllm.LLM`, without the disk, and forgets what it computed with the old ones.

    Raises:
        RuntimeError: a request is still running, so its keys and values cannot be forgotten.
    """
    # vLLM's own loader: it takes checkpoint names, fuses and shards as the engine needs, and casts on copy. Without an
    # iterator it would read the weights from disk.
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
    llm.apply_model(_repack_head)
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefix cache: a request of an earlier rollout batch is still running")


def _repack_head(model: nn.Module) -> None:
    """On a CPU the output layer computes with a packed copy, and a reload leaves it stale where it is tied to the embeddings."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
