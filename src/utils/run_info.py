"""Records of a run that make it repeatable: config, code, packages, machine."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from omegaconf import DictConfig, OmegaConf

from src.utils.data_contents import DataContents
from src.utils.run_folder import unresolved
from src.utils.run_logger import RunLogger, flatten
from src.utils.secrets import redact, without_secrets

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "mteb", "mlflow", "hydra-core", "datasets", "numpy", "peft", "vllm")
"""Distributions whose versions are recorded, if installed."""


def git_state(root: Path) -> dict[str, str]:
    """Returns `git.commit` of a working copy and whether it differs from that commit (`git.dirty`).

    Outside a repository, before the first commit and without git, the commit says so and there is no `git.dirty`.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    try:
        commit = git("rev-parse", "--verify", "HEAD")
    except FileNotFoundError:
        return {"git.commit": "none: git is not installed"}
    if commit.returncode != 0:
        inside = git("rev-parse", "--git-dir").returncode == 0
        return {"git.commit": "none: nothing committed yet" if inside else "none: not a git repository"}
    return {"git.commit": commit.stdout.strip(), "git.dirty": str(bool(git("status", "--porcelain").stdout.strip())).lower()}


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns `version.<name>` of Python and of those packages that are installed."""
    found = {"version.python": platform.python_version()}
    for package in packages:
        try:
            found[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional extra
    return found


def hardware() -> dict[str, str]:
    """Returns platform, usable cores, torch's threads, memory and visible GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware.platform": platform.platform(),
        "hardware.cores": str(cores),
        "hardware.threads": str(torch.get_num_threads()),
        "hardware.memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
        "hardware.gpus": ", ".join(gpus) or "none",
    }


def run_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a config under dotted names; places within the run's folder as such, so that two runs do not differ in them."""
    folder = config.get("paths", {}).get("output_dir")
    return {
        name: value.replace(folder, "${paths.output_dir}") if folder and isinstance(value, str) and name != "paths.output_dir" else value
        for name, value in flatten(config)
    }


def description(cfg: DictConfig, data: DataContents | None, what: str) -> str:
    """Returns a run's description for MLflow's UI (Markdown): what it is, its data, the command, its folder."""
    lines = [what] if what else []
    if data is not None:
        lines.append(f"Data: {data.name}, {data.records:,} records ({data.source if len(data.source) <= 200 else data.source[:199] + '…'})")
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        lines.append(f"Command: `python {hydra.job.name}.py {' '.join(unresolved(hydra.overrides.task))}`")
    return redact("  \n".join([*lines, f"Folder: `{cfg.paths.output_dir}`"]))


def log_run_info(
    loggers: Sequence[Logger], cfg: DictConfig, root: Path, new_run: bool = False, data: DataContents | None = None, what: str = ""
) -> None:
    """Logs the resolved config without secrets as hyperparameters; to MLflow also as config.yaml, and code, packages, machine as tags.

    A resumed MLflow run keeps its parameters and its config.yaml; the new config is logged as config_resumed.yaml.

    Args:
        data: what is trained on.
        what: the run in a few words, for its description.
        new_run: start a new MLflow run in place of the one that the folder holds.

    Raises:
        omegaconf.errors.MissingMandatoryValue: a value of the config is still `???`.
    """
    config: dict[str, Any] = without_secrets(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    params, tags = run_params(config), git_state(root) | package_versions() | hardware()
    tags[MLFLOW_RUN_NOTE] = description(cfg, data, what)
    for logger in loggers:
        if new_run and isinstance(logger, RunLogger):
            logger.start_new_run()
        logger.log_hyperparams(params)
        if isinstance(logger, RunLogger):
            logger.log_tags(tags)
            if data is not None:
                logger.log_data(data, "training")
            logger.log_text(yaml.safe_dump(config, sort_keys=False), "config_resumed.yaml" if logger.resumed else "config.yaml")
