"""Sweeps that are grouped in MLflow, outlive a failed point, and go on where they were stopped.

Hydra's callback opens the parent run and hands it to every point as one more override, so it reaches whatever process a
launcher starts. `run_point` stands between Hydra and `train`.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from lightning.fabric.utilities.rank_zero import rank_zero_only
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from sqlalchemy.exc import SQLAlchemyError

from src.utils.run_info import git_state
from src.utils.secrets import redact
from src.utils.sweep_report import read_sweep, write_report
from src.utils.sweep_store import ERROR, FOLDER, RESULT, attempts, open_parent, own_run, point_tags, run_name, short

log = logging.getLogger(__name__)

DEFAULT_METRIC = "mteb/average"


def run_point(cfg: DictConfig, function: Callable[[DictConfig], float | None]) -> float | None:
    """`function(cfg)`; for a point of a sweep that has finished before, what it returned then.

    An Optuna search is gone on with in the same way: it proposes the same points again as long as it is told the same.
    """
    if cfg.sweep_run is None or rank_zero_only.rank:  # type: ignore[attr-defined]  # other ranks follow the first
        return function(cfg)
    client = MlflowClient(cfg.logger.tracking_uri)
    parent = client.get_run(cfg.sweep_run)
    for run in attempts(client, parent, cfg):
        if RESULT in run.data.tags:
            log.info("finished before, not repeated: MLflow run %s, %s", run.info.run_id, run.data.tags[FOLDER])
            warn_of_other_code(run, git_state(Path(cfg.paths.root))["git.commit"])
            return json.loads(run.data.tags[RESULT])
        if run.info.status == "RUNNING":  # its process was killed: a point runs once at a time
            client.set_terminated(run.info.run_id, "KILLED")
    hydra: Any = HydraConfig.get()
    tags = point_tags(parent, cfg, hydra)
    with open_dict(cfg):
        cfg.logger.tags, cfg.logger.run_name = tags, run_name(tags)
    result = function(cfg.copy())  # Hydra's instantiate resolves in place what a node refers to, and a point goes by what is written
    run_id = own_run(client, parent, cfg, hydra)
    client.set_tag(run_id, RESULT, json.dumps(result))
    client.set_terminated(run_id)
    return result


def warn_of_other_code(run: Run, commit: str) -> None:
    """Says where a point that is not repeated was computed by another commit than this one."""
    before = run.data.tags.get("git.commit", commit)
    if before != commit:
        log.warning("that was commit %s, this is %s: delete the run in MLflow to have the point computed again", before[:10], commit[:10])


class TrackedSweep(Callback):
    """Hydra's callback around a sweep: opens the parent run, notes failed points and lets the others go on, reports at the end.

    Does nothing outside of sweeps, and nothing with `logger=none`; Hydra then names the first failed point when all are done.

    Args:
        metrics: what the report shows, by their names in MLflow; the best point is that of the first. Without any it is
            `optimized_metric`, or else mteb/average.
        direction: of that metric, `maximize` or `minimize`.
        curves: metrics that the report draws over steps.

    Raises:
        ValueError: another direction.
    """

    def __init__(self, metrics: Sequence[str] = (), direction: str = "maximize", curves: Sequence[str] = ()) -> None:
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"hydra.callbacks.sweep.direction={direction!r}: it is maximize or minimize")
        self.metrics, self.direction, self.curves = list(metrics), direction, list(curves)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("logger"):
            return
        metrics = self.metrics or [config.optimized_metric or DEFAULT_METRIC]
        try:
            parent = open_parent(config, {"metrics": metrics, "direction": self.direction, "curves": self.curves})
        except (
            MlflowException,
            SQLAlchemyError,
            OmegaConfBaseException,
            OSError,
        ) as error:  # Hydra itself would warn, and go on without a parent
            raise SystemExit(f"sweep: no parent run at {redact(config.logger.tracking_uri)}: {error}") from error
        with read_write(config), open_dict(config):
            config.sweep_run = parent.info.run_id
            config.hydra.overrides.task.append(f"sweep_run='{parent.info.run_id}'")
        log.info("sweep: MLflow run %s", parent.info.run_id)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.sweep_run is None or job_return.status is not JobStatus.FAILED:
            return
        error = job_return._return_value  # the public property raises it
        client = MlflowClient(config.logger.tracking_uri)
        run_id = own_run(client, client.get_run(config.sweep_run), config, config.hydra)
        client.set_tag(run_id, ERROR, redact(" ".join(f"{type(error).__name__}: {error}".split()))[:2000])
        client.set_terminated(run_id, "FAILED")
        log.error("this point failed, the sweep goes on", exc_info=error)
        # A sweeper that sees an exception ends the sweep. Optuna takes nan for a trial that failed.
        job_return.return_value, job_return.status = math.nan, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.sweep_run is None:
            return
        client = MlflowClient(config.logger.tracking_uri)
        sweep = read_sweep(client, config.sweep_run)
        for file in write_report(client, sweep, config.hydra.sweep.dir):
            log.info("sweep: %s", file)
        best = sweep.best()
        log.info(
            "sweep: %d points finished, best %s", len(sweep.points), f"{short(best[0])} ({best[1]:.4g})".strip() if best else "not known"
        )
        now = Path(config.hydra.sweep.dir).absolute()
        failures = [failure for failure in sweep.failures if Path(failure["folder"]).is_relative_to(now)]
        client.set_terminated(config.sweep_run, "FAILED" if failures else "FINISHED")
        if failures:
            named = "\n".join(f"  {failure['values']}: {failure['error']}" for failure in failures)
            count = f"{len(failures)} of {len(failures) + len(sweep.points)} points"
            raise SystemExit(f"sweep: {count} failed; the same command tries these again, and no others:\n{named}")
