"""The settings that decide what a run computes: saved in its folder and compared when it resumes."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.utils.atomic import write_atomic
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
    *("cpu_kv_cache_gib", "gpu_memory_utilization", "sleep", "tensor_parallel", "_convert_", "_partial_"),
}
"""Last parts of names: places, and how much is computed at a time."""
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
    """Returns `name=new in place of old` for each setting that differs; a renamed setting or a moved class is no difference."""
    old, new = _current_names(before), _current_names(after)
    return [
        f"{name}={after.get(name)} in place of {old.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def settings_changed(settings: Mapping[str, Any], folder: Path, checkpoint: str | None) -> bool:
    """Returns whether a run that resumes in its folder has changed settings; warns of changes, in any folder.

    The batches after the checkpoint that MLflow holds then belong to an abandoned trajectory.
    """
    if checkpoint is None:
        return False
    home = Path(checkpoint).parent.parent
    changed = changes(read_settings(home) or settings, settings)
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
    return current


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)
