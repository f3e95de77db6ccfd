"""Another attention for a policy's own transformers model, for as long as a pass takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """While in force, the attention layers of a transformers model call what `AttentionInterface` knows as `name`."""
    config: Any = model.config
    config = config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def recomputing_alike(model: PreTrainedModel) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """`context_fn` of `torch.utils.checkpoint`: what the backward pass computes again attends as it did the first time.

    By then `attending_by` is no longer in force.
    """
    config = model.config.get_text_config()
    return lambda: (nullcontext(), attending_by(model, config._attn_implementation))


def refuse_unread(kwargs: Mapping[str, Any], what: str) -> None:
    """Refuses what a layer asks of its attention and `what` would ignore.

    Raises:
        ValueError: a layer with a sliding window, sinks or a soft cap.
    """
    unread = [name for name in ("sliding_window", "s_aux", "softcap") if kwargs.get(name) is not None]
    if unread:
        raise ValueError(f"{what} this model: its attention has {', '.join(unread)}, which is not read here; use a model without")
