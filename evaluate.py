"""Scores policies on MTEB tasks: `python evaluate.py`, `python evaluate.py model=<checkpoint, folder, hub name> benchmark=mteb_eng_v1`."""

import inspect
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # MTEB's data loaders fork

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.evaluation.abilities import ability_markdown, ability_metrics, ability_table, check_abilities, compare, run_abilities
from src.evaluation.benchmarks import named_tasks
from src.evaluation.comparison import Contender, comparison_table, contenders, latest_export
from src.evaluation.run_tasks import EvaluationScores, run_tasks
from src.evaluation.starting_policy import start_of_export, starting_policy
from src.evaluation.tasks.offline_tasks import offline_tasks
from src.evaluation.tasks.wordnet_tasks import wordnet_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.policy.packaged import SMOLLM2
from src.utils.renamed_settings import check_arguments, check_config
from src.utils.run_info import log_run_info
from src.utils.secrets import keep_secrets
from src.utils.timing import clock
from src.utils.tracking import write_text

log = logging.getLogger(__name__)


EVERYDAY = "experiments/everyday_english/data"
"""The everyday English that benchmark=everyday is made of, in the project's folder."""


def device_of(cfg: DictConfig) -> str:
    """Where policies work."""
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(cfg.device)


def make_encoder(cfg: DictConfig, policy: Policy, settings: EncoderSettings, rationale: bool) -> RationaleEncoder:
    """The encoder of a policy as the config wants it, on its device."""
    told = ("instruction", "query_instruction", "max_prompt_tokens", "template_kwargs", "max_new_tokens", "pooling", "layer")
    asked: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = replace(settings, **{name: asked[name] for name in told if asked[name] is not None})
    policy.pooling, policy.layer = settings.pooling, settings.layer
    make_engine, lengths = instantiate(cfg.engine), {"max_new_tokens": settings.max_new_tokens}
    if "max_prompt_tokens" in inspect.signature(make_engine.func).parameters:  # an engine that is set up for them
        lengths["max_prompt_tokens"] = settings.max_prompt_tokens
    engine = make_engine(**lengths)
    options = {"temperature": cfg.temperature, "seed": cfg.seed, "batch_size": cfg.batch_size}
    return RationaleEncoder(policy.to(device_of(cfg)), settings, engine, rationale=rationale, **options)


def load_tasks(cfg: DictConfig) -> list[Any]:
    """The MTEB tasks that the config names.

    Raises:
        FileNotFoundError, ValueError: see `named_tasks`, `offline_tasks` and `wordnet_tasks`; or both test and validation are named,
            or nothing is.
    """
    names = [cfg.benchmark] if isinstance(cfg.benchmark, str) else list(cfg.benchmark)
    if not names:
        raise ValueError("benchmark names no task: it is test, validation, everyday, a benchmark of MTEB, a task, or a list of them")
    offline = [name for name in dict.fromkeys(names) if name in ("test", "validation")]
    if len(offline) > 1:
        raise ValueError("benchmark names test and validation: their tasks have the same names, so score them one after the other")
    own = [offline_tasks(list(cfg.packages[name]), cfg.paths.cache_dir, size=cfg.size, load=False) for name in offline]
    if "everyday" in names:
        own.append(wordnet_tasks(Path(cfg.paths.root, EVERYDAY), cfg.paths.cache_dir, size=cfg.size, load=False))
    others = [name for name in names if name not in (*offline, "everyday")]
    return [*(task for tasks in own for task in tasks), *named_tasks(others, cfg.data_dir)]


def log_row(cfg: DictConfig, row: Contender, scores: EvaluationScores) -> None:
    """One MLflow run a row: its own config, every task, every category, the average."""
    if not cfg.get("logger"):
        return
    logger = instantiate(cfg.logger, run_name=f"{cfg.name}: {row.name}", folder=None)  # a row goes on from no other
    own = cfg.copy()
    own.model, own.rationale = row.path, row.rationale
    log_run_info([logger], own, root=Path(cfg.paths.root))
    logger.log_metrics(scores.flat("eval/"))
    if hasattr(logger.experiment, "log_dict"):
        logger.experiment.log_dict(logger.run_id, asdict(scores), "scores.json")
    logger.finalize("success" if not scores.failures else "failed")


def load_policies(cfg: DictConfig, rows: Sequence[Contender], base: str) -> tuple[dict[str, tuple[Policy, EncoderSettings]], str]:
    """The rows' policies by path and, where abilities are asked for, the one that they are compared with; and its path.

    That is `base`, but for a `model` without one what its training began with.

    Raises:
        FileNotFoundError, ValueError: see `load_policy`, `check_abilities` and `starting_policy`.
        ModuleNotFoundError: see `check_abilities`.
    """
    asked = cfg.abilities
    if asked.tasks:
        check_abilities(asked.tasks, asked.packages, asked.cache_dir, asked.count)
    policies = {path: load_policy(path, cfg.trust_remote_code) for path in {row.path for row in rows}}
    if not asked.tasks:
        return policies, base
    if cfg.model is not None and cfg.base is None:
        base = starting_policy(cfg.model, policies[cfg.model][0])
    if base not in policies:
        try:
            policies[base] = load_policy(base, cfg.trust_remote_code)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"abilities are compared with a base, and {error}; base= names another") from error
    return policies, base


def report_abilities(cfg: DictConfig, policies: Mapping[str, tuple[Policy, EncoderSettings]], base: str, console: Console) -> None:
    """What each policy kept of the general abilities of `base`: a table, a page in the run's folder, an MLflow run."""
    device = device_of(cfg)
    before = run_abilities(policies[base][0].to(device), **cfg.abilities)
    for path in policies.keys() - {base}:
        after = run_abilities(policies[path][0].to(device), **cfg.abilities)
        changes = {task: compare(score, after[task], cfg.abilities_tolerance) for task, score in before.items()}
        console.print(ability_table(changes, f"General abilities of {Path(path).name} beside {Path(base).name}"))
        write_text(Path(cfg.paths.output_dir) / f"abilities_{Path(path).name}.md", ability_markdown(changes))
        if cfg.get("logger"):
            logger = instantiate(cfg.logger, run_name=f"{cfg.name}: abilities of {Path(path).name}")
            log_run_info([logger], cfg, root=Path(cfg.paths.root))
            logger.log_metrics(ability_metrics(changes))
            logger.finalize("success")


def evaluate(cfg: DictConfig) -> dict[str, EvaluationScores]:
    """Scores by row; prints their table."""
    console = Console()
    L.seed_everything(cfg.seed, verbose=False)
    began = time.monotonic()
    trained = latest_export(cfg.paths.output_root) if cfg.model is None else None
    base = str(cfg.base or (trained and start_of_export(trained)) or SMOLLM2)
    rows = contenders(cfg.model, cfg.rationale, base, cfg.paths.output_root, cfg.model_name)
    try:
        policies, base = load_policies(cfg, rows, base)
        if trained is not None and cfg.base is None:  # read as its training read it
            policies[base] = (policies[base][0], policies[str(trained)][1])
        rows = [row.settled(policies[row.path][1].rationale) for row in rows]
        encoders = {row.name: make_encoder(cfg, *policies[row.path], rationale=bool(row.rationale)) for row in rows}
        tasks = load_tasks(cfg)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    scores: dict[str, EvaluationScores] = {}
    unavailable: dict[str, str] = {}
    for row in rows:
        log.info("%s: %d tasks", row.name, len(tasks))
        encoder = encoders[row.name]
        with torch.autocast(encoder.policy.device.type, dtype=torch.bfloat16, enabled=cfg.bf16):
            scored = run_tasks(
                *(encoder, tasks, Path(cfg.results_dir), row.model_name),
                embeddings_dir=Path(cfg.embeddings.folder) if cfg.embeddings.folder else None,
                embeddings_gib=cfg.embeddings.max_gib,
                unavailable=unavailable,
                announce=True,
            )
        unavailable |= {task: scored.failures[task] for task in scored.without_data}  # no use in waiting for it again
        scores[row.name] = scored
        log_row(cfg, row, scored)
    console.print(comparison_table(scores, f"Main scores in %: {cfg.benchmark}"))
    if cfg.abilities.tasks:
        report_abilities(cfg, policies, base, console)
    for row in rows:
        console.print(f"{row.name}: {row.path}", soft_wrap=True, highlight=False, markup=False)
    if cfg.model is None and len(rows) < 3:
        console.print(f"No trained policy under {cfg.paths.output_root}: `python train.py` makes one.", soft_wrap=True, markup=False)
    places = f"MTEB's result files: {cfg.results_dir}. Scored in {clock(time.monotonic() - began)}"
    console.print(places, soft_wrap=True, highlight=False, markup=False)
    return scores


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """The command line. Ends in an error if a task failed."""
    check_config(cfg, "evaluate.py")
    scores = evaluate(cfg)
    failures = {task: reason for scored in scores.values() for task, reason in scored.failures.items()}
    if failures:
        count = len({task for scored in scores.values() for task in (*scored.tasks, *scored.failures)})
        lines = "".join(f"\n  {task}: {reason}" for task, reason in failures.items())
        raise SystemExit(f"evaluate.py: {len(failures)} of {count} tasks have no score{lines}")


if __name__ == "__main__":
    keep_secrets(sys.argv)
    check_arguments(sys.argv)
    main()
