"""The settings that decide what a run computes: saved in its folder and compared when it resumes."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.utils.atomic import write_atomic
from src.utils.data_contents import DataContents
from src.utils.renamed_settings import RENAMED
from src.utils.run_logger import flatten
from src.utils.secrets import without_secrets

log = logging.getLogger(__name__)

FILE = "settings.json"
"""In a run's folder: dotted name -> value."""

_GROUPS = ("seed", "reward", "algorithm", "policy", "rollout", "module", "datamodule", "trainer.precision")
_DUPLICATES = ("module.policy", "module.engine", "module.reward", "module.algorithm", "datamodule.limit")
_WITHOUT_EFFECT = {
    *("cache_dir", "num_proc", "trust_remote_code", "micro_batch_tokens", "batch_tokens", "gradient_checkpointing"),
    *("cpu_kv_cache_gib", "gpu_memory_utilization", "sleep", "tensor_parallel", "cuda_graphs", "cast_weights", "_convert_", "_partial_"),
}
"""Last parts of names: places, and how and how much is computed at a time."""
_AS_BEFORE = {"algorithm.tis_mode": "truncate", "module.distill_loss": "similarity"}
"""What settings that an older run did not have are to be, for what it computed."""
_DATA = "data."
_NAMES_DATA = tuple(f"datamodule.{name}" for name in ("_target_", "path", "files", "revision", "columns", "train_packages"))
_RENAMED_CLASSES = {"HFRollouts": "HFEngine", "VLLMRollouts": "VLLMEngine"}
_SECOND_REWARD = "module.pathwise_reward"


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that decide what a run computes, resolved, without secrets; not paths, monitoring or duration."""
    config = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    return {
        name: value
        for name, value in flatten(config)
        if _within(name, _GROUPS) and not _within(name, _DUPLICATES) and name.rpartition(".")[2] not in _WITHOUT_EFFECT
    }


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the run in a folder; None if it has saved none, or only a part."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Saves settings in a run's folder."""
    write_atomic(folder / FILE, json.dumps(settings, indent=1, default=str) + "\n")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns `name=new in place of old` for each setting that differs.

    A renamed setting or a moved class is no difference, nor is one that only one of them has, with a value that has no effect.
    """
    old, new = _current_names(before), _current_names(after)
    differ = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    in_force = [name for name in differ if (name in old or _acts(name, new[name])) and (name in new or _acts(name, old[name]))]
    return [f"{name}={after.get(name)} in place of {old.get(name)}" for name in in_force]


def data_settings(data: DataContents | None) -> dict[str, Any]:
    """Returns what identifies the training data, to be saved with the settings; empty if that is not known."""
    return {f"{_DATA}digest": data.digest, f"{_DATA}records": data.records} if data and data.digest else {}


def require_same_data(settings: Mapping[str, Any], checkpoint: str | None, allowed: bool) -> None:
    """Checks that the data under the settings of a resumed run is still the data that it began with.

    The run would go on at its old place, which is another one in other data: some records would be seen twice and others never.

    Args:
        settings: of now, those of `data_settings` among them.
        allowed: go on nevertheless; `settings_changed` then names the change.

    Raises:
        RuntimeError: the data changed, and none of the datamodule's settings that name the data.
    """
    before = read_settings(Path(checkpoint).parent.parent) if checkpoint is not None and not allowed else None
    lines = changes(_with_data(before or settings, settings), settings)
    changed = [line for line in lines if line.startswith(_DATA)]
    if changed and not any(_within(line.partition("=")[0], _NAMES_DATA) for line in lines):
        raise RuntimeError(
            f"the training data is not what the run of {checkpoint} began with ({'; '.join(changed)}): put it back, start a new run, or go "
            "on with it as it is now, at the old place in a new order, by allow_changed_data=true"
        )


def _with_data(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with the data of `after` where they name none, as those of runs of earlier versions."""
    return {name: value for name, value in after.items() if name.startswith(_DATA)} | dict(before)


def settings_changed(settings: Mapping[str, Any], folder: Path, checkpoint: str | None) -> bool:
    """Returns whether a run that resumes in its folder has changed settings; warns of changes, in any folder.

    The batches after the checkpoint that MLflow holds then belong to an abandoned trajectory.
    """
    if checkpoint is None:
        return False
    home = Path(checkpoint).parent.parent
    changed = changes(_with_data(read_settings(home) or settings, settings), settings)
    if changed:
        log.warning("goes on with other settings than it began with: %s", "; ".join(changed))
    return bool(changed) and home.resolve() == folder.resolve()


def _current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as JSON has them, under their current names and with classes by their names alone."""
    current = {}
    for name, value in json.loads(json.dumps(settings, default=str)).items():
        if name.endswith("_target_"):
            value = value.rpartition(".")[2]
            value = _RENAMED_CLASSES.get(value, value)
        nested = name.startswith(f"{_SECOND_REWARD}.")
        new = RENAMED.get(name.replace(_SECOND_REWARD, "reward", 1) if nested else name)
        current[name if new is None else new.replace("reward", _SECOND_REWARD, 1) if nested else new] = value
    if current.get("algorithm.tis_cap") == "auto" and current.get("rollout._target_") == "HFEngine":
        current["algorithm.tis_cap"] = None  # what it is for an exact engine
    return {name: value for name, value in current.items() if name.rpartition(".")[2] not in _WITHOUT_EFFECT}


def _acts(name: str, value: Any) -> bool:
    """Returns whether a setting that an older run did not have changes what is computed; null, 0, false, empty and none do not."""
    return bool(value) and value not in ("none", _AS_BEFORE.get(name))


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)
