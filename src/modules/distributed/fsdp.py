"""A policy whose weights are cut over the ranks (FSDP2, `fully_shard`): how it is cut, and when it is whole.

Its forward pass, which updates go through, gathers one layer's weights after the other. What samples, encodes and evaluates
calls the model's inner parts, a pass for each token, and ranks write rationales of different lengths: for that the weights
are gathered once, and are plain tensors until `whole` ends.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.initialization import no_init_weights

from src.modules.policy.lora import add_lora, lora_settings
from src.modules.policy.model import Policy
from src.modules.types import dummy_rollouts


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Cuts the policy's weights over the ranks of a mesh, layer by layer; a second call does nothing.

    A frozen encoder is left whole on every rank: it has no gradients and no optimiser state, which are most of what is saved.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    if isinstance(policy, FSDPModule):
        return
    layers = getattr(policy.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"trainer=fsdp cannot cut {type(policy.model).__name__}: it has no `layers` to gather one by one; use trainer=ddp")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    frozen = set() if policy.frozen_encoder is None else set(policy.frozen_encoder.parameters())
    fully_shard(policy, mesh=mesh, ignored_params=frozen)


def is_cut(policy: Policy) -> bool:
    """Whether the weights are cut as they stand."""
    return any(isinstance(weight, DTensor) for weight in policy.parameters())


@contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """While in force, every rank has all weights as plain tensors; for passes without gradients. All ranks enter it together."""
    if not isinstance(policy, FSDPModule) or not is_cut(policy):
        yield
        return
    policy.set_reshard_after_forward(False)
    with torch.no_grad():
        policy(dummy_rollouts(policy.pad_id).to(policy.device))  # a pass gathers all; and the first must go through the outermost part
    try:
        yield
    finally:
        policy.set_reshard_after_forward(True)
        policy.set_reshard_after_forward(False, recurse=False)  # a backward pass begins where the forward pass ended
        for part in policy.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@contextmanager
def gradient_exchange(policy: Policy, strategy: Strategy, now: bool) -> Iterator[None]:
    """Backward passes within add up the gradients of this rank; the one with `now` averages them over the ranks, once."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(now)
        yield
    elif now or not isinstance(strategy, ParallelStrategy):
        yield
    else:
        with strategy.block_backward_sync():
            yield


def global_grad_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all of them, of cut ones over the ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def global_dot(left: Tensor, right: Tensor) -> float:
    """The inner product of two tensors, of cut ones over the ranks."""
    product = (left * right).sum()
    return float(product.full_tensor() if isinstance(product, DTensor) else product)


def plain_copy(policy: Policy) -> Policy:
    """The same policy in CPU memory with weights of its own that are not cut; within `whole` where it is.

    `copy.deepcopy` refuses a cut one.
    """
    with no_init_weights():  # they are copied below
        model = type(policy.model)(copy.deepcopy(policy.model.config))
    model.generation_config = copy.deepcopy(policy.model.generation_config)
    lora = lora_settings(policy.model)
    if lora is not None:
        add_lora(model, LoraConfig(**lora))
    model.tie_weights()
    model.load_state_dict(dict(policy.model.named_parameters(remove_duplicate=False)))
    plain = Policy(model, policy.tokenizer, "live", policy.pooling, policy.layer)
    plain.frozen_encoder = copy.deepcopy(policy.frozen_encoder)
    return plain
