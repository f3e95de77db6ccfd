"""Attention with a mask, and how a transformers model is given an attention."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

_SHORT = 192
"""Keys up to which a CPU's attention with its gradient is faster in float32 than in bfloat16: at 80 keys 2.6 times, at 256 as fast."""


@contextmanager
def attention_set_to(model: nn.Module, name: str) -> Iterator[None]:
    """Sets the attention of a transformers model to the one named `name` in `AttentionInterface`, and back at the end."""
    config: Any = model.config
    config = config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def checkpoint_contexts(model: PreTrainedModel) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Returns the `context_fn` of `torch.utils.checkpoint` for a model: recomputation uses the attention of the forward pass.

    By then `attention_set_to` has ended.
    """
    config = model.config.get_text_config()
    return lambda: (nullcontext(), attention_set_to(model, config._attn_implementation))


def require_supported(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if a layer asks its attention for sinks or a soft cap: neither is computed here.

    Args:
        kwargs: what the layer passes to its attention.
    """
    if unread := [name for name in ("s_aux", "softcap") if kwargs.get(name) is not None]:
        raise ValueError(
            f"the model's attention has {', '.join(unread)}, which rollouts that share a prompt do not support; use a model without"
        )


def causal_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Returns [T, T] bool, in which a token sees the last `window` tokens, itself included; None where plain causal attention is that."""
    if window is None or tokens <= window:
        return None
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu(1 - window)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, dropout: float = 0.0) -> Tensor:
    """Returns the attention [N, heads, tokens, d] of queries to keys that are visible, [tokens, keys] bool; None is causal.

    Short attention of bfloat16 that has a gradient is computed in float32 on a CPU, for speed.
    """
    if query.requires_grad and query.dtype == torch.bfloat16 and key.shape[2] <= _SHORT and query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return masked_attention(query.float(), key.float(), value.float(), visible, scaling, dropout).to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    if visible is not None and grouped and query.device.type != "cpu":  # only the CPU's fast kernel reads grouped heads with a mask
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, is_causal=visible is None, scale=scaling, enable_gqa=grouped
    )
