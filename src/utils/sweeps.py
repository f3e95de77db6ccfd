"""Sweeps that are grouped in MLflow, survive failed points and resume where they were stopped.

A sweep is one parent run in MLflow with a child run for every attempt at a point. All state is in their tags, so points may run
in this process, in workers or on other machines. `TrackedSweep`, Hydra's callback, opens the parent run and passes its id to every
point as an override; `run_point` stands between Hydra and `train`.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from lightning.fabric.utilities.rank_zero import rank_zero_only
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from sqlalchemy.exc import SQLAlchemyError

from src.utils.mlflow_store import experiment_id
from src.utils.run_info import git_state
from src.utils.secrets import redact, without_secrets

log = logging.getLogger(__name__)

DEFAULT_METRIC = "mteb/average"

PARENT = "mlflow.parentRunId"
"""MLflow's own tag: its UI nests a run below the one that this names."""

SWEEP, KEYS, REPORT = "sweep.id", "sweep.keys", "sweep.report"
"""Tags of the parent: fingerprint of command and config; as JSON the swept keys, and what the report shows."""

POINT, VALUES, FOLDER, RESULT, ERROR = "sweep.point", "sweep.values", "sweep.folder", "sweep.result", "sweep.error"
"""Tags of a child: fingerprint of its config, swept values (JSON), output folder, returned value (JSON; of a finished point only) and
why it failed."""

_NOT_PART_OF_A_POINT = ("hydra", "paths", "logger", "sweep_run")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def run_point(cfg: DictConfig, function: Callable[[DictConfig], float | None]) -> float | None:
    """Returns `function(cfg)`, or what it returned before if this is a point of a sweep that has finished already.

    An Optuna search resumes in the same way: told the same results, its seeded sampler proposes the same points again.
    """
    if cfg.sweep_run is None or rank_zero_only.rank:  # type: ignore[attr-defined]  # other ranks follow rank 0
        return function(cfg)
    client = MlflowClient(cfg.logger.tracking_uri)
    parent = client.get_run(cfg.sweep_run)
    for run in _attempts(client, parent, cfg):
        if RESULT in run.data.tags:
            log.info("finished before, not repeated: MLflow run %s, %s", run.info.run_id, run.data.tags[FOLDER])
            warn_of_other_code(run, git_state(Path(cfg.paths.root))["git.commit"])
            return json.loads(run.data.tags[RESULT])
        if run.info.status == "RUNNING":  # its process was killed: a point is never run twice at a time
            client.set_terminated(run.info.run_id, "KILLED")
    hydra: Any = HydraConfig.get()
    with open_dict(cfg):
        cfg.logger.tags = _point_tags(parent, cfg, hydra)
        cfg.logger.run_name = _run_name(cfg.logger.tags)
    result = function(cfg.copy())  # Hydra's instantiate resolves interpolations in place, and the fingerprint is of the unresolved config
    run_id = _point_run(client, parent, cfg, hydra)
    client.set_tag(run_id, RESULT, json.dumps(result))
    client.set_terminated(run_id)
    return result


def warn_of_other_code(run: Run, commit: str) -> None:
    """Warns if a point that is not repeated was computed by another commit."""
    before = run.data.tags.get("git.commit", commit)
    if before != commit:
        log.warning("that was commit %s, this is %s: delete the run in MLflow to have the point computed again", before[:10], commit[:10])


class TrackedSweep(Callback):
    """Hydra's callback around a sweep: opens the parent run, records failed points and continues, reports at the end.

    Does nothing outside of sweeps and with `logger=none`; Hydra then names the first failed point when all are done.

    Args:
        metrics: MLflow metrics of the report; the first decides which point is best. Default: `optimized_metric`, else mteb/average.
        direction: `maximize` or `minimize`, of the first metric.
        curves: metrics that the report draws over steps.
        report: dotted name of a function of (MlflowClient, run id, folder) that writes the report.

    Raises:
        ValueError: another direction.
    """

    def __init__(
        self, metrics: Sequence[str] = (), direction: str = "maximize", curves: Sequence[str] = (), report: str | None = None
    ) -> None:
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"hydra.callbacks.sweep.direction={direction!r}: it is maximize or minimize")
        self.metrics, self.direction, self.curves, self.report = list(metrics), direction, list(curves), report

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.get("logger"):
            return
        metrics = self.metrics or [config.optimized_metric or DEFAULT_METRIC]
        try:
            parent = open_parent(config, {"metrics": metrics, "direction": self.direction, "curves": self.curves})
        except (MlflowException, SQLAlchemyError, OmegaConfBaseException, OSError, RuntimeError) as error:  # Hydra would warn and continue
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
        run_id = _point_run(client, client.get_run(config.sweep_run), config, config.hydra)
        client.set_tag(run_id, ERROR, redact(" ".join(f"{type(error).__name__}: {error}".split()))[:2000])
        client.set_terminated(run_id, "FAILED")
        log.error("this point failed, the sweep goes on", exc_info=error)
        # A sweeper that sees an exception ends the sweep. Optuna takes nan for a failed trial.
        job_return.return_value, job_return.status = math.nan, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.sweep_run is None:
            return
        client = MlflowClient(config.logger.tracking_uri)
        finished, failed = outcomes(client, client.get_run(config.sweep_run))
        log.info("sweep: %d points finished", len(finished))
        if self.report is not None:
            get_method(self.report)(client, config.sweep_run, config.hydra.sweep.dir)
        folder = Path(config.hydra.sweep.dir).absolute()
        failed = {values: run for values, run in failed.items() if Path(run.data.tags[FOLDER]).is_relative_to(folder)}
        client.set_terminated(config.sweep_run, "FAILED" if failed else "FINISHED")
        if failed:
            named = "\n".join(f"  {short(json.loads(values))}: {run.data.tags[ERROR]}" for values, run in failed.items())
            count = f"{len(failed)} of {len(failed) + len(finished)} points"
            raise SystemExit(f"sweep: {count} failed; the same command tries these again, and no others:\n{named}")


# ---- the parent run


def open_parent(config: DictConfig, report: dict[str, Any]) -> Run:
    """Returns the parent run of a sweep; a new one if there is none of the same command on the same configs.

    Args:
        config: the sweep's, with its `hydra` node.
        report: metrics, direction and curves of the report.
    """
    client, logger = MlflowClient(config.logger.tracking_uri), config.logger
    local = logger.tracking_uri.startswith("sqlite:")  # any other store has its own place for artifacts
    experiment = experiment_id(client, logger.experiment_name, logger.artifact_location if local else None)
    overrides, params = list(config.hydra.overrides.task), OmegaConf.select(config, "hydra.sweeper.params")
    typed = [override for override in overrides if not override.startswith(("paths.", "project="))]
    sweep = fingerprint(config, params, sorted(typed))
    if found := search(client, experiment, **{SWEEP: sweep}):
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(experiment, run_name=redact("sweep " + " ".join(typed))).info.run_id
    given = parse([*(f"{key}={value}" for key, value in (params or {}).items()), *overrides])
    swept = [key for key, override in given.items() if override.is_sweep_override()]
    for name, value in {SWEEP: sweep, KEYS: json.dumps(swept), REPORT: json.dumps(report)}.items():
        client.set_tag(run_id, name, value)
    settings = {"overrides": overrides, "sweeper": OmegaConf.to_container(config.hydra.sweeper, resolve=True)}
    client.log_dict(run_id, without_secrets(settings), "sweep.yaml")
    return client.get_run(run_id)


def outcomes(client: MlflowClient, parent: Run) -> tuple[dict[str, Run], dict[str, Run]]:
    """Returns the last attempt at each finished point, and at each point that failed and never finished, by the tag `VALUES`."""
    finished: dict[str, Run] = {}
    failed: dict[str, Run] = {}
    for run in reversed(search(client, parent.info.experiment_id, **{PARENT: parent.info.run_id})):
        for tag, runs in ((RESULT, finished), (ERROR, failed)):
            if tag in run.data.tags:
                runs[run.data.tags[VALUES]] = run
    return finished, {values: run for values, run in failed.items() if values not in finished}


# ---- a point's run


def _attempts(client: MlflowClient, parent: Run, cfg: DictConfig) -> list[Run]:
    return search(client, parent.info.experiment_id, **{PARENT: parent.info.run_id, POINT: fingerprint(cfg)})


def _point_tags(parent: Run, cfg: DictConfig, hydra: DictConfig) -> dict[str, str]:
    given = parse(hydra.overrides.task)
    values = {key: str(given[key].get_value_element_as_str()).strip("'\"") for key in json.loads(parent.data.tags[KEYS]) if key in given}
    folder = str(hydra.runtime.output_dir)
    return {PARENT: parent.info.run_id, POINT: fingerprint(cfg), VALUES: json.dumps(values), FOLDER: folder}


def _point_run(client: MlflowClient, parent: Run, cfg: DictConfig, hydra: DictConfig) -> str:
    """Returns the id of this attempt's run; makes one if the attempt ended before its logger did."""
    tags = _point_tags(parent, cfg, hydra)
    for run in _attempts(client, parent, cfg):
        if run.data.tags[FOLDER] == tags[FOLDER]:
            return str(run.info.run_id)
    return str(client.create_run(parent.info.experiment_id, tags=tags, run_name=_run_name(tags)).info.run_id)


def _run_name(tags: Any) -> str:
    return short(json.loads(tags[VALUES])) or "point"


# ---- configs, overrides, values


def fingerprint(cfg: DictConfig, *more: Any) -> str:
    """Returns 16 hex digits that identify a config, however it was composed: `0.2` and `0.20` are one point.

    Paths and the logger are left out. Interpolations count as written, because some resolve to the time.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    settings = {name: value for name, value in config.items() if name not in _NOT_PART_OF_A_POINT}
    return hashlib.sha256(json.dumps([settings, *more], sort_keys=True, default=str).encode()).hexdigest()[:16]


def parse(overrides: Sequence[str]) -> dict[str, Override]:
    """Returns overrides by key; of several for one key the last."""
    return {override.key_or_group: override for override in OverridesParser.create().parse_overrides(list(overrides))}


def rounded(value: str) -> str:
    """Returns a value as tables show it: a number of more than 8 characters with 4 significant digits."""
    return f"{float(value):.4g}" if len(value) > 8 and _NUMBER.fullmatch(value) else value


def short(values: dict[str, str]) -> str:
    """Returns `{"reward.hard_weight": "0.2", "seed": "1"}` as `hard_weight=0.2, seed=1`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={rounded(value)}" for key, value in values.items())


def search(client: MlflowClient, experiment_id: str, **tags: str) -> list[Run]:
    """Returns the runs of an experiment with these tags, newest first; `%` matches any text."""
    condition = " and ".join(f"tags.`{name}` LIKE '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment_id], condition, max_results=50_000, order_by=["attributes.start_time DESC"]))
