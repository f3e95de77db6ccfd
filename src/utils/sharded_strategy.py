"""Lightning's strategy for cut weights (FSDP2), over all processes, with checkpoints as every other strategy writes them."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

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

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy over all processes of all nodes, whose checkpoints hold whole weights and optimiser states.

    So a checkpoint can be gone on with on another number of processes or without this strategy, and evaluated. Lightning's
    own takes the devices of a node for tensor parallelism unless told how many there are, and reads whole checkpoints past the
    trainer's CheckpointIO and before the module's hooks.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    # ---- checkpoints: gathered on rank zero, read by every rank

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state with parameters by number, as any optimiser has it, on rank zero; nothing on the others."""
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        named: Any = get_optimizer_state_dict(self._module, own, options=_WHOLE)
        if not self.is_global_zero:
            return {}
        number = {name: i for i, name in enumerate(self._names(own))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {number[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """By the trainer's CheckpointIO, which replaces one that is there; Lightning's own takes its folder for a mistake."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
            named: Any = {"state": {names[i]: own for i, own in state["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self._module, optimizer, named, options=StateDictOptions(full_state_dict=True))

    @property
    def _module(self) -> Any:
        return self.lightning_module

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimiser's parameters, in its order."""
        name = {parameter: name for name, parameter in self._module.named_parameters()}
        return [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]
