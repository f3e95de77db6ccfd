"""The weights of linear layers in autocast's dtype, cast once for many passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from src.modules.policy.buffers import Buffers


@contextmanager
def cast_weights(module: nn.Module, buffers: Buffers) -> Iterator[None]:
    """Under autocast, gives the linear layers copies of their weights in its dtype while in force, for passes without gradients.

    Autocast casts every weight at every call: where a pass reads each weight for one token a row, this takes longer than the
    products. Outputs are those of autocast to the bit. Adapters stay apart, as merged in bfloat16 the little that they have
    learned would be rounded away. Normalisation and the token embeddings are not cast by autocast either.

    Args:
        buffers: hold the copies, 2 bytes a weight; with the same ones, the copies of the next call have the same place.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    device = layers[0].weight.device if layers else torch.device("cpu")
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    given = [(layer, name, weight) for layer in layers for name, weight in layer.named_parameters(recurse=False) if weight.dtype != dtype]
    copies = [buffers(f"weight {i}", weight.shape, dtype, device) for i, (_, _, weight) in enumerate(given)]
    if given:
        torch._foreach_copy_(copies, [weight.detach() for _, _, weight in given])
    try:
        for (layer, name, _), copy in zip(given, copies, strict=True):
            setattr(layer, name, nn.Parameter(copy, requires_grad=False))
        yield
    finally:
        for layer, name, weight in given:
            setattr(layer, name, weight)
