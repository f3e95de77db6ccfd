"""Dropout of a model that was made to go without, as language models of today are."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from src.modules.types import Rollouts

if TYPE_CHECKING:
    from src.modules.policy.model import Policy


def set_attention_dropout(model: nn.Module, share: float) -> None:
    """Sets which share of the attention's weights is dropped in training; the model's config, and so an export, keeps its own.

    Raises:
        ValueError: no share of one, or a model whose layers have no such setting.
    """
    if not 0 <= share < 1:
        raise ValueError(f"policy.attention_dropout={share}: it is a share, 0 or above and below 1")
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if not layers:
        raise ValueError(f"policy.attention_dropout={share}: {type(model).__name__} has no attention_dropout to set; use a model that has")
    for layer in layers:
        layer.attention_dropout = share  # type: ignore[assignment]


def has_dropout(policy: "Policy", rollouts: Rollouts) -> bool:
    """Whether two passes over the same sequences differ in training, now or (adapters begin as zeros) later."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.model.modules()):
        return True
    modes = [(module, module.training) for module in policy.modules()]
    policy.train()
    with isolate_rng(), torch.no_grad():
        first, second = policy.embed(rollouts), policy.embed(rollouts)
    for module, training in modes:
        module.training = training
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-6)
