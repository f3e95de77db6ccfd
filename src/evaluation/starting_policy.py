"""Where a trained policy came from."""

from pathlib import Path

from omegaconf import OmegaConf

from src.modules.encoder.export import CHECKPOINT_SUFFIX
from src.modules.policy.model import Policy

_CONFIG = ".hydra/config.yaml"  # Hydra's copy, in a run's folder


def starting_policy(path: str, policy: Policy) -> str:
    """The folder or hub name of the policy that a training began with.

    A checkpoint says it; of an export the config of the run does, in whose folder it lies.

    Args:
        path: a training checkpoint, an exported folder, or a name on the hub.
        policy: what was read from there.

    Raises:
        ValueError: nobody knows.
    """
    start = policy.path if Path(path).suffix == CHECKPOINT_SUFFIX else start_of_export(Path(path))
    if not start:
        raise ValueError(
            f"abilities.tasks compares {path} with the policy that its training began with, which is not known here: name it by base="
        )
    return start


def start_of_export(export: Path) -> str | None:
    """policy.path of the run that wrote an export; None where there is no such run, or its policy came from no path."""
    file = export.absolute().parent / _CONFIG
    if not export.is_dir() or not file.is_file():
        return None
    path = OmegaConf.select(OmegaConf.load(file), "policy.path")
    return None if path is None else str(path)
