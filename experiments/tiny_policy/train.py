"""Trains the tiny policy from random weights by cold_start.yaml: `python -m experiments.tiny_policy.train module.compile=true`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from src.utils.renamed_settings import check_arguments, check_config
from src.utils.secrets import keep_secrets
from src.utils.sweeps import run_point
from train import train


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent), config_name="cold_start")
def main(cfg: DictConfig) -> float | None:
    """Runs `train` of train.py on the recipe's config."""
    check_config(cfg, "experiments.tiny_policy.train")
    return run_point(cfg, train)


if __name__ == "__main__":
    keep_secrets(sys.argv)
    check_arguments(sys.argv)
    main()
