"""From a group of configs to a list of objects."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig


def instantiate_all(configs: DictConfig | None, group: str) -> list[Any]:
    """The objects that a group of configs describes, in its order.

    Args:
        configs: name -> config with a `_target_`, or a single such config. None, for the group or for an entry, stands
            for nothing: `callbacks.mteb=null` switches one off.
        group: its name, for errors.

    Raises:
        ValueError: an entry is neither null nor a config with a `_target_`.
    """
    if not configs:
        return []
    if "_target_" in configs:
        return [instantiate(configs)]
    objects = []
    for name, config in configs.items():
        if config is None:
            continue
        if not isinstance(config, DictConfig) or "_target_" not in config:
            raise ValueError(f"{group}.{name!s} has no _target_ (it is {config!r}): give it one in configs/{group}, or set it to null")
        objects.append(instantiate(config))
    return objects
