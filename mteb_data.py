"""Downloads MTEB's data sets for machines without a network: `python mteb_data.py benchmark=mteb_eng_v2 data_dir=/data/mteb`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it

from src.utils.ready import require_ready

require_ready("mteb_data.py")

import hydra
from omegaconf import DictConfig

from src.evaluation.benchmarks import named_tasks
from src.evaluation.tasks.mteb_mirror import download
from src.utils.plain_errors import plain_errors
from src.utils.secrets import keep_secrets


@hydra.main(version_base="1.3", config_path="configs", config_name="mteb_data")
def main(cfg: DictConfig) -> None:
    """Downloads the data; exits with an error that names the data sets that cannot be downloaded."""
    try:
        tasks = named_tasks([cfg.benchmark] if isinstance(cfg.benchmark, str) else list(cfg.benchmark))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"mteb_data.py: {error}") from error
    failures = download(tasks, Path(cfg.data_dir))
    if failures:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        raise SystemExit(f"mteb_data.py: {len(failures)} data sets cannot be downloaded; the others are in {cfg.data_dir}{lines}")


if __name__ == "__main__":
    with plain_errors("mteb_data.py"):
        keep_secrets(sys.argv)
        main()
