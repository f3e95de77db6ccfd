"""Objects from a group of configs."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig


def instantiate_all(configs: DictConfig | None, group: str) -> list[Any]:
    """Returns the objects that a group of configs describes, in its order.

    Args:
        configs: name -> config with a `_target_`, or one such config. An entry that is None (`callbacks.mteb=null`) is left out.
        group: its name, for errors.

    Raises:
        ValueError: an entry is neither null nor a config with a `_target_`.
    """
    if configs and "_target_" in configs:
        return [instantiate(configs)]
    entries = {name: config for name, config in (configs or {}).items() if config is not None}
    for name, config in entries.items():
        if not isinstance(config, DictConfig) or "_target_" not in config:
            raise ValueError(f"{group}.{name!s} has no _target_ (it is {config!r}): give it one in configs/{group}, or set it to null")
    return [instantiate(config) for config in entries.values()]
