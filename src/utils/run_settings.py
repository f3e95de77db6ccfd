"""The settings that a run computes with: kept in its folder, and compared where a run goes on."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.utils.run_info import flatten
from src.utils.secrets import without_secrets

log = logging.getLogger(__name__)

FILE = "settings.json"
"""In a run's folder: what it computes with, by dotted names."""

_GROUPS = ("seed", "reward", "algorithm", "policy", "rollout", "module", "datamodule", "trainer.precision")
_SAID_ELSEWHERE = ("module.policy", "module.engine", "module.reward", "module.algorithm", "datamodule.limit")
_WITHOUT_EFFECT = {
    *("cache_dir", "num_proc", "trust_remote_code", "micro_batch_tokens", "encode_batch_size", "batch_tokens", "gradient_checkpointing"),
    *("cpu_kv_cache_gib", "gpu_memory_utilization", "sleep", "tensor_parallel", "_convert_", "_partial_"),
}
"""Last parts of names: where things lie, and how much is done at once."""


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """What a config computes with, resolved and without secrets; not where things lie, what looks on, or how long it goes on."""
    config = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    return {name: value for name, value in flatten(config) if _counts(name)}


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Those of the run in a folder; None where it has left none, or only a part."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Leaves them in a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{FILE}.partial"
    aside.write_text(_plain(settings) + "\n", encoding="utf-8")
    aside.replace(folder / FILE)


def changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`name=new in place of old` for each setting that is another one."""
    before, after = json.loads(_plain(begun)), json.loads(_plain(now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}={after.get(name)} in place of {before.get(name)}"


def is_another(settings: Mapping[str, Any], folder: Path, checkpoint: str | None) -> bool:
    """Whether a run that goes on in its own folder computes something else from now on; what is new is said, in any folder.

    What MLflow holds of the batches after the checkpoint is then of a trajectory that was given up.
    """
    if checkpoint is None:
        return False
    home = Path(checkpoint).parent.parent
    changed = list(changes(read_settings(home) or settings, settings))
    if changed:
        log.warning("goes on with other settings than it began with: %s", "; ".join(changed))
    return bool(changed) and home.resolve() == folder.resolve()


def _plain(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, default=str)


def _counts(name: str) -> bool:
    return _within(name, _GROUPS) and not _within(name, _SAID_ELSEWHERE) and name.rpartition(".")[2] not in _WITHOUT_EFFECT


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)
