"""Scores policies on MTEB tasks: `python evaluate.py`, `python evaluate.py model=<checkpoint, folder or hub name> rationale=false`."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # MTEB's data loaders fork

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from src.datamodules.offline_tasks import offline_tasks
from src.modules.encoder import RationaleEncoder
from src.modules.export import load_policy
from src.modules.policy import Policy
from src.modules.settings import EncoderSettings
from src.utils.comparison import Contender, comparison_table, contenders
from src.utils.evaluation import EvaluationScores, named_tasks, run_tasks
from src.utils.run_info import log_run_info
from src.utils.secrets import keep_secrets


def make_encoder(cfg: DictConfig, policy: Policy, settings: EncoderSettings, rationale: bool) -> RationaleEncoder:
    """The encoder of a policy as the config wants it, on its device."""
    settings = replace(settings, **{name: cfg[name] for name in ("max_new_tokens", "pooling", "layer") if cfg[name] is not None})
    policy.pooling, policy.layer = settings.pooling, settings.layer
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    engine = instantiate(cfg.engine)(max_new_tokens=settings.max_new_tokens)
    options = {"temperature": cfg.temperature, "seed": cfg.seed, "batch_size": cfg.batch_size}
    return RationaleEncoder(policy.to(device), settings, engine, rationale=rationale, **options)


def load_tasks(cfg: DictConfig) -> list[Any]:
    """The MTEB tasks that the config names."""
    offline = {"test": cfg.packages.test, "validation": cfg.packages.validation}
    if isinstance(cfg.tasks, str) and cfg.tasks in offline:
        return offline_tasks(list(offline[cfg.tasks]), cfg.paths.cache_dir, size=cfg.size)
    return named_tasks([cfg.tasks] if isinstance(cfg.tasks, str) else list(cfg.tasks), cfg.mirror)


def log_row(cfg: DictConfig, row: Contender, scores: EvaluationScores) -> None:
    """One MLflow run a row: its own config, every task, every category, the average."""
    if not cfg.get("logger"):
        return
    logger = instantiate(cfg.logger, run_name=f"{cfg.name}: {row.name}")
    own = cfg.copy()
    own.model, own.rationale = row.path, row.rationale
    log_run_info([logger], own, root=Path(cfg.paths.root))
    logger.log_metrics(scores.flat("eval/"))
    if hasattr(logger.experiment, "log_dict"):
        logger.experiment.log_dict(logger.run_id, asdict(scores), "scores.json")
    logger.finalize("success" if not scores.failures else "failed")


def evaluate(cfg: DictConfig) -> dict[str, EvaluationScores]:
    """Scores by row; prints their table."""
    console = Console()
    L.seed_everything(cfg.seed, verbose=False)
    rows = contenders(cfg.model, cfg.rationale, cfg.base, cfg.paths.output_root)
    try:
        policies = {path: load_policy(path, cfg.trust_remote_code) for path in {row.path for row in rows}}
        tasks = load_tasks(cfg)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    scores: dict[str, EvaluationScores] = {}
    for row in rows:
        encoder = make_encoder(cfg, *policies[row.path], rationale=row.rationale)
        with torch.autocast(encoder.policy.device.type, dtype=torch.bfloat16, enabled=cfg.bf16):
            scores[row.name] = run_tasks(encoder, tasks, Path(cfg.results_dir), row.name)
        log_row(cfg, row, scores[row.name])
    console.print(comparison_table(scores, f"Main scores in %, tasks: {cfg.tasks}"))
    for row in rows:
        console.print(f"{row.name}: {row.path}", soft_wrap=True, highlight=False, markup=False)
    if cfg.model is None and len(rows) < 3:
        console.print(f"No trained policy under {cfg.paths.output_root}: `python train.py` makes one.", soft_wrap=True, markup=False)
    console.print(f"MTEB's result files: {cfg.results_dir}", soft_wrap=True, highlight=False, markup=False)
    return scores


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """The command line. Ends in an error if a task failed."""
    failures = {task: reason for scores in evaluate(cfg).values() for task, reason in scores.failures.items()}
    if failures:
        raise SystemExit("evaluate.py: " + "; ".join(f"{task} failed: {reason}" for task, reason in failures.items()))


if __name__ == "__main__":
    keep_secrets(sys.argv)
    main()
