"""Policies, encoders, tasks and MLflow runs from the config of evaluate.py."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.evaluation.abilities import ability_markdown, ability_metrics, ability_table, check_abilities, compare, run_abilities
from src.evaluation.benchmarks import named_tasks
from src.evaluation.comparison import Contender, starting_policy
from src.evaluation.run_tasks import EvaluationScores
from src.evaluation.tasks.offline_tasks import offline_tasks
from src.evaluation.tasks.wordnet_tasks import wordnet_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings, RationaleFor
from src.modules.policy.model import Policy
from src.utils.atomic import write_atomic
from src.utils.outbox import store_errors
from src.utils.run_info import log_run_info
from src.utils.run_logger import RunLogger
from src.utils.tracking import task_contents

log = logging.getLogger(__name__)

EVERYDAY = "experiments/everyday_english/data"
"""Data of benchmark=everyday, in the project's folder."""

_SETTINGS = ("instruction", "query_instruction", "max_prompt_tokens", "template_kwargs", "max_new_tokens", "pooling", "layer")

Policies = Mapping[str, tuple[Policy, EncoderSettings]]
"""By path."""


def device_of(cfg: DictConfig) -> str:
    """Returns `device`; `auto` is cuda where there is one."""
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(cfg.device)


def load_policies(cfg: DictConfig, rows: Sequence[Contender], base: str) -> tuple[dict[str, tuple[Policy, EncoderSettings]], str]:
    """Loads the policies of the rows and, if abilities are asked for, the one that they are compared with; returns its path too.

    That is `base`; if `model` is named without a base, the one that its training began with.

    Raises:
        FileNotFoundError, ValueError: see `load_policy`, `check_abilities` and `starting_policy`.
        ModuleNotFoundError: see `check_abilities`.
    """
    asked = cfg.abilities
    if asked.tasks:
        check_abilities(asked.tasks, asked.packages, asked.cache_dir, asked.count)
    policies = {path: load_policy(path, cfg.trust_remote_code) for path in {row.path for row in rows}}
    if asked.tasks:
        if cfg.model is not None and cfg.base is None:
            base = starting_policy(cfg.model, policies[cfg.model][0])
        if base not in policies:
            try:
                policies[base] = load_policy(base, cfg.trust_remote_code)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"abilities are compared with a base, and {error}; base= names another") from error
    return policies, base


def make_encoder(cfg: DictConfig, policy: Policy, settings: EncoderSettings, rationale: RationaleFor) -> RationaleEncoder:
    """Returns the encoder of a policy on `device`, with the settings that the config names in place of the model's."""
    asked: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = replace(settings, **{name: asked[name] for name in _SETTINGS if asked[name] is not None})
    policy.pooling, policy.layer = settings.pooling, settings.layer
    make_engine, lengths = instantiate(cfg.engine), {"max_new_tokens": settings.max_new_tokens}
    if "max_prompt_tokens" in inspect.signature(make_engine.func).parameters:  # vLLM's engine allocates for them
        lengths["max_prompt_tokens"] = settings.max_prompt_tokens
    options = {"temperature": cfg.temperature, "seed": cfg.seed, "batch_tokens": cfg.batch_tokens, "bf16": cfg.bf16}
    return RationaleEncoder(policy.to(device_of(cfg)), settings, make_engine(**lengths), rationale=rationale, **options)


def load_tasks(cfg: DictConfig) -> list[Any]:
    """Returns the MTEB tasks of `benchmark`.

    Raises:
        FileNotFoundError, ValueError: see `named_tasks`, `offline_tasks` and `wordnet_tasks`; or `benchmark` names nothing, or both test
            and validation.
    """
    names = [cfg.benchmark] if isinstance(cfg.benchmark, str) else list(cfg.benchmark)
    if not names:
        raise ValueError("benchmark names no task: it is test, validation, everyday, a benchmark of MTEB, a task, or a list of them")
    offline = [name for name in dict.fromkeys(names) if name in ("test", "validation")]
    if len(offline) > 1:
        raise ValueError("benchmark names test and validation, whose tasks have the same names: score them one after the other")
    tasks: list[Any] = []
    for name in offline:
        tasks += offline_tasks(list(cfg.packages[name]), cfg.paths.cache_dir, size=cfg.size, load=False)
    if "everyday" in names:
        tasks += wordnet_tasks(Path(cfg.paths.root, EVERYDAY), size=cfg.size, load=False)
    return tasks + named_tasks([name for name in names if name not in (*offline, "everyday")], cfg.data_dir)


def keep_scores(cfg: DictConfig, rows: Sequence[Contender], scores: Mapping[str, EvaluationScores], tasks: Sequence[Any]) -> None:
    """Writes the scores of all rows to scores.json in the output folder, and logs an MLflow run of each: config, tasks, averages.

    A store that cannot be had loses nothing: a warning says where the scores are and how they get there later.
    """
    file = Path(cfg.paths.output_dir) / "scores.json"
    write_atomic(file, json.dumps({name: asdict(found) for name, found in scores.items()}, indent=1) + "\n")
    if not cfg.get("logger"):
        return
    try:
        for row in rows:
            _log_scores(cfg, row, scores[row.name], tasks)
    except store_errors() as error:
        log.warning("%s: the scores are not in MLflow but in %s; the same command sends them, and computes none again", error, file)


def _new_run(cfg: DictConfig, name: str) -> Any:
    """Returns a logger that starts a run; raises what the logger raises, and not Hydra's error around it."""
    try:
        return instantiate(cfg.logger, run_name=name, folder=None)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def _log_scores(cfg: DictConfig, row: Contender, scores: EvaluationScores, tasks: Sequence[Any]) -> None:
    logger = _new_run(cfg, f"{cfg.name}: {row.name}")
    own = cfg.copy()
    own.model, own.rationale = row.path, row.rationale
    log_run_info([logger], own, root=Path(cfg.paths.root), what=f"Scores of {row.name}: `{row.path}`")
    logger.log_metrics(scores.flat("eval/"))
    for task in tasks if isinstance(logger, RunLogger) else ():
        logger.log_data(task_contents(task), "evaluation")
    if hasattr(logger.experiment, "log_dict"):
        logger.experiment.log_dict(logger.run_id, asdict(scores), "scores.json")
    logger.finalize("success" if not scores.failures else "failed")


def report_abilities(cfg: DictConfig, policies: Policies, base: str, console: Console) -> None:
    """Compares general abilities of each policy with those of `base`: prints and writes a table, and logs an MLflow run."""
    before = run_abilities(policies[base][0].to(device_of(cfg)), **cfg.abilities)
    for path in policies.keys() - {base}:
        name = Path(path).name
        after = run_abilities(policies[path][0].to(device_of(cfg)), **cfg.abilities)
        changes = {task: compare(score, after[task], cfg.abilities_tolerance) for task, score in before.items()}
        console.print(ability_table(changes, f"General abilities of {name} beside {Path(base).name}"))
        file = Path(cfg.paths.output_dir) / f"abilities_{name}.md"
        write_atomic(file, ability_markdown(changes))
        if cfg.get("logger"):
            try:
                logger = _new_run(cfg, f"{cfg.name}: abilities of {name}")
                log_run_info([logger], cfg, root=Path(cfg.paths.root), what=f"General abilities of {name} beside {Path(base).name}")
                logger.log_metrics(ability_metrics(changes))
                logger.finalize("success")
            except store_errors() as error:
                log.warning("%s: the abilities are not in MLflow but in %s", error, file)
