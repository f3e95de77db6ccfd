"""Scores policies on MTEB tasks: `python evaluate.py`, `python evaluate.py model=<checkpoint, folder, hub name> benchmark=mteb_eng_v1`."""

import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # MTEB's data loaders fork

from src.utils.ready import require_ready

require_ready("evaluate.py")

import hydra
import lightning as L
from omegaconf import DictConfig
from rich.console import Console

from src.evaluation.comparison import TRAINED, comparison_table, contenders, how_it_was_found, latest_export, start_of_export
from src.evaluation.run_tasks import EvaluationScores, run_tasks
from src.evaluation.setup import keep_scores, load_policies, load_tasks, make_encoder, report_abilities
from src.modules.policy.packaged import SMOLLM2
from src.utils.plain_errors import plain_errors
from src.utils.renamed_settings import check_arguments, check_config
from src.utils.secrets import keep_secrets
from src.utils.timing import clock

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, EvaluationScores]:
    """Scores every policy, prints their table, and returns the scores by row.

    Raises:
        SystemExit: a model, a task or a setting that does not exist, before anything is scored.
    """
    console, began = Console(), time.monotonic()
    L.seed_everything(cfg.seed, verbose=False)
    trained = latest_export(cfg.paths.output_root) if cfg.model is None else None
    if trained is not None:
        log.info("%s: %s", TRAINED, how_it_was_found(trained, cfg.paths.output_root))
    base = str(cfg.base or (trained and start_of_export(trained)) or SMOLLM2)
    try:
        rows = contenders(cfg.model, cfg.rationale, base, cfg.paths.output_root, cfg.model_name)
        policies, base = load_policies(cfg, rows, base)
        if trained is not None and cfg.base is None:  # the prompt and pooling of its training
            policies[base] = (policies[base][0], policies[str(trained)][1])
        rows = [row.settled(policies[row.path][1].rationale) for row in rows]
        encoders = {row.name: make_encoder(cfg, *policies[row.path], rationale=row.rationale or "both") for row in rows}
        tasks = load_tasks(cfg)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    scores: dict[str, EvaluationScores] = {}
    options = {"embeddings_dir": cfg.embeddings.folder and Path(cfg.embeddings.folder), "embeddings_gib": cfg.embeddings.max_gib}
    unavailable: dict[str, str] = {}  # tasks whose data is out of reach are tried once
    for row in rows:
        log.info("%s: %d tasks", row.name, len(tasks))
        encoder, results = encoders[row.name], Path(cfg.results_dir)
        scored = run_tasks(encoder, tasks, results, row.model_name, unavailable=unavailable, announce=True, **options)
        unavailable |= {task: scored.failures[task] for task in scored.without_data}
        scores[row.name] = scored
    console.print(comparison_table(scores, f"Main scores in %: {cfg.benchmark}"))
    keep_scores(cfg, rows, scores, tasks)
    if cfg.abilities.tasks:
        report_abilities(cfg, policies, base, console)
    lines = [f"{row.name}: {row.path}" for row in rows]
    if cfg.model is None and len(rows) < 3:
        lines.append(f"No trained policy under {cfg.paths.output_root}: `python train.py` makes one.")
    lines.append(f"MTEB's result files: {cfg.results_dir}. Scored in {clock(time.monotonic() - began)}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return scores


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Runs the command line; ends in an error if a task has no score."""
    check_config(cfg, "evaluate.py")
    scores = evaluate(cfg)
    failures = {task: reason for scored in scores.values() for task, reason in scored.failures.items()}
    if failures:
        count = len({task for scored in scores.values() for task in (*scored.tasks, *scored.failures)})
        lines = "".join(f"\n  {task}: {reason}" for task, reason in failures.items())
        raise SystemExit(f"evaluate.py: {len(failures)} of {count} tasks have no score{lines}")


if __name__ == "__main__":
    with plain_errors("evaluate.py"):
        keep_secrets(sys.argv)
        check_arguments(sys.argv)
        main()
