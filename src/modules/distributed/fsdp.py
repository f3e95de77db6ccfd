"""A policy whose weights are sharded over the ranks (FSDP2, `fully_shard`).

Its forward pass, which updates use, gathers one layer's weights after the other. Sampling, encoding and evaluation call the model's inner
parts, once for each token, and ranks write rationales of different lengths: for these the weights are gathered once and are plain tensors
until `summon_full_params` ends.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.initialization import no_init_weights

from src.modules.policy.lora import add_lora, lora_settings
from src.modules.policy.model import Policy
from src.modules.types import dummy_rollouts


def shard(policy: Policy, mesh: DeviceMesh, reduce_dtype: torch.dtype = torch.float32, gather_dtype: torch.dtype = torch.float32) -> None:
    """Shards the policy's weights over the ranks of a mesh, layer by layer; a second call does nothing.

    Weights are gathered in `gather_dtype`. Under bfloat16 autocast products are the same with both; norms and the embedding table, which
    autocast leaves in float32, are rounded by bfloat16.

    Gradients are summed in `reduce_dtype`, over the ranks and over the passes of a step on each: in bfloat16 what the 500th of many passes
    adds is lost, so few and large passes go with it.

    A frozen encoder stays in full on every rank: it has no gradients and no optimiser state, which are most of what sharding saves.

    Raises:
        ValueError: the model has no `layers`.
    """
    if isinstance(policy, FSDPModule):
        return
    layers = getattr(policy.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"trainer=fsdp cannot shard {type(policy.model).__name__}: it has no `layers`; use trainer=ddp")
    precision = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    frozen = set() if policy.frozen_encoder is None else set(policy.frozen_encoder.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=frozen)


def is_sharded(policy: Policy) -> bool:
    """Returns whether the weights are sharded at this moment."""
    return any(isinstance(weight, DTensor) for weight in policy.parameters())


@contextmanager
def summon_full_params(policy: Policy) -> Iterator[None]:
    """Gives every rank all weights as plain tensors while in force, for passes without gradients. All ranks enter it together."""
    if not isinstance(policy, FSDPModule) or not is_sharded(policy):
        yield
        return
    policy.set_reshard_after_forward(False)
    with torch.no_grad():
        policy(dummy_rollouts(policy.pad_id).to(policy.device))  # a pass gathers all; the first must go through the outermost module
    try:
        yield
    finally:
        policy.set_reshard_after_forward(True)
        policy.set_reshard_after_forward(False, recurse=False)  # a backward pass begins where the forward pass ended
        for part in policy.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@contextmanager
def gradient_sync(policy: Policy, strategy: Strategy, now: bool) -> Iterator[None]:
    """Accumulates gradients of backward passes on this rank; the pass with `now` averages them over the ranks, once."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(now)
        yield
    elif now or not isinstance(strategy, ParallelStrategy):
        yield
    else:
        with strategy.block_backward_sync():
            yield


def global_grad_norm(gradients: Sequence[Tensor]) -> float:
    """Returns the norm of all gradients, of sharded ones over the ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def global_dot(left: Tensor, right: Tensor) -> float:
    """Returns the inner product of two tensors, of sharded ones over the ranks."""
    product = (left * right).sum()
    return float(product.full_tensor() if isinstance(product, DTensor) else product)


def unsharded_copy(policy: Policy) -> Policy | None:
    """Returns a copy of a sharded policy in CPU memory, in float32 whatever its weights are gathered in; None on all ranks but the first.

    All ranks call it together, outside of `summon_full_params`.
    """
    weights = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:
        return None
    with no_init_weights():  # they are copied below
        model = type(policy.model)(copy.deepcopy(policy.model.config))
    model.generation_config = copy.deepcopy(policy.model.generation_config)
    lora = lora_settings(policy.model)
    if lora is not None:
        add_lora(model, LoraConfig(**lora))
    model.tie_weights()
    model.load_state_dict(weights)
    plain = Policy(model, policy.tokenizer, "live", policy.pooling, policy.layer)
    plain.frozen_encoder = copy.deepcopy(policy.frozen_encoder)
    return plain
