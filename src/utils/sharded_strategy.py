"""Lightning's FSDP2 strategy over all processes, with checkpoints in the format of every other strategy."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Shards weights over all processes of all nodes; gathers weights and optimizer states for checkpoints.

    So a run can resume on another number of processes or without this strategy. Lightning's own strategy uses a node's devices
    for tensor parallelism unless told otherwise, and bypasses the trainer's CheckpointIO and the module's hooks for full checkpoints.

    Attributes:
        reduce_dtype: of gradients while they are summed over the ranks.
        gather_dtype: of weights while they are gathered, for sampling and updates; each rank's share stays in float32.

    Raises:
        ValueError: a dtype that is neither float32 nor bfloat16.
    """

    def __init__(
        self,
        reduce_dtype: str = "float32",
        gather_dtype: str = "float32",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        for name, dtype in {"reduce_dtype": reduce_dtype, "gather_dtype": gather_dtype}.items():
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f"trainer.strategy.{name}={dtype}: it is float32 or bfloat16")
        self.reduce_dtype: torch.dtype = getattr(torch, reduce_dtype)
        self.gather_dtype: torch.dtype = getattr(torch, gather_dtype)
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the full state with parameters by number, as plain optimizers have it, on rank 0; {} on the others."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        named: Any = get_optimizer_state_dict(self._module, plain, options=_FULL)
        if not self.is_global_zero:
            return {}
        number = {name: i for i, name in enumerate(self._names(plain))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {number[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves with the trainer's CheckpointIO, as other strategies do."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
            named: Any = {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self._module, optimizer, named, options=StateDictOptions(full_state_dict=True))

    @property
    def _module(self) -> Any:
        return self.lightning_module

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Returns the names of an optimizer's parameters, in its order."""
        name = {parameter: name for name, parameter in self._module.named_parameters()}
        return [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]
