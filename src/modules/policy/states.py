"""Hidden states of a transformers backbone: those that its output layer reads, and those that are pooled."""

from typing import Any

from torch import Tensor, nn


def states_at(backbone: nn.Module, layer: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """[N, T, D] last hidden states (after the final norm), and those of `layer`.

    Args:
        layer: -1, the last hidden states again; -2, what the last layer was given (before any final norm), which is
            `hidden_states[-2]` of transformers without keeping those of every layer.
        inputs: of the backbone.

    Raises:
        ValueError: the backbone does not say what its layers are.
    """
    if layer == -1:
        last: Tensor = backbone(**inputs).last_hidden_state
        return last, last
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"policy.layer={layer}: {type(backbone).__name__} has no `layers` to look between; use policy.layer=-1")
    given: list[Tensor] = []
    hook = layers[layer + 1].register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        last = backbone(**inputs).last_hidden_state
    finally:
        hook.remove()
    return last, given[0]
