"""The trainer's weights under the names of a plain checkpoint, and how they get into a vLLM engine in this process."""

import copy
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its name in a checkpoint of the model without adapters; tied ones under the first name.

    LoRA layers are merged into copies, one at a time: merged in place and taken back out, the frozen weights would move
    by a rounding error at every rollout batch.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)
    for name, weight in model.named_parameters():
        if not name.startswith(inside):
            yield name, weight.detach()
    for name, module in adapted.items():
        layer: Any = copy.deepcopy(module)
        if not layer.disable_adapters:
            layer.merge()
        for own, weight in layer.get_base_layer().named_parameters():
            yield f"{name}.{own}", weight.detach()


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
