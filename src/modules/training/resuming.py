"""Settings of the optimiser that a resumed run asks for, where they are others than those it was begun with."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


def use_new_settings(checkpoint: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Puts learning rate and weight decay into a checkpoint's optimiser and scheduler, which would bring back the old ones.

    Where both are as they were, nothing is touched.
    """
    begun = checkpoint["hyper_parameters"]
    changed = [name for name in ("learning_rate", "weight_decay") if begun[name] != settings[name]]
    for name in changed:
        log.warning("goes on with module.%s=%g in place of %g", name, settings[name], begun[name])
    rate = settings["learning_rate"]
    for group in (group for state in checkpoint["optimizer_states"] if changed for group in state["param_groups"]):
        if "learning_rate" in changed:
            group["lr"], group["initial_lr"] = group["lr"] / begun["learning_rate"] * rate, rate
        group["weight_decay"] = settings["weight_decay"]
    for scheduler in checkpoint["lr_schedulers"] if "learning_rate" in changed else []:
        scheduler["base_lrs"] = [rate] * len(scheduler["base_lrs"])
