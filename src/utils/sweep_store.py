"""How a sweep stands in MLflow: one parent run, a child run for every attempt at a point, and tags by which they are found again.

Nothing here is kept in a process: points may run in this one, in workers or on other machines.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from src.utils.secrets import redact, without_secrets

PARENT = "mlflow.parentRunId"
"""MLflow's own: its UI shows a run below the one that this names."""

SWEEP, KEYS, REPORT = "sweep.id", "sweep.keys", "sweep.report"
"""On the parent: which command on which configs, and as JSON what is swept and what its report shows.

A changed command, config or list of values is another sweep."""

POINT, VALUES, FOLDER, RESULT, ERROR = "sweep.point", "sweep.values", "sweep.folder", "sweep.result", "sweep.error"
"""On a child: its config's fingerprint, the swept values (JSON), its output folder, what it returned (JSON; only a finished point
has one), and why it failed."""

_NOT_COMPUTED_WITH = ("hydra", "paths", "logger", "sweep_run")
_PAGE = 1000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def fingerprint(cfg: DictConfig, *more: Any) -> str:
    """16 hex digits that stand for a config, however it was put together: `0.2` and `0.20` are one point.

    What says only where things lie is left out. Interpolations count as they are written, not by what they are resolved
    to, as some are resolved to the time.
    """
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    computed_with = {name: value for name, value in config.items() if name not in _NOT_COMPUTED_WITH}
    return hashlib.sha256(json.dumps([computed_with, *more], sort_keys=True, default=str).encode()).hexdigest()[:16]


def sweeper_overrides(config: DictConfig) -> list[str]:
    """What a sweep is made of: hydra.sweeper.params, then the command line, which wins."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)


def parse(overrides: Sequence[str]) -> dict[str, Override]:
    """Overrides by what they set; of several for the same the last."""
    return {override.key_or_group: override for override in OverridesParser.create().parse_overrides(list(overrides))}


def swept_keys(config: DictConfig) -> list[str]:
    """What is swept over: keys and groups with several values."""
    return [key for key, override in parse(sweeper_overrides(config)).items() if override.is_sweep_override()]


def rounded(value: str) -> str:
    """A value as tables show it: a number with more than 8 characters is cut to 4 digits."""
    return f"{float(value):.4g}" if len(value) > 8 and _NUMBER.fullmatch(value) else value


def short(values: dict[str, str]) -> str:
    """`{"reward.hard_weight": "0.2", "seed": "1"}` as `hard_weight=0.2, seed=1`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={rounded(value)}" for key, value in values.items())


def search(client: MlflowClient, experiment_id: str, **tags: str) -> list[Run]:
    """All runs of an experiment with these tags, the newest first; `%` stands for any text."""
    condition = " and ".join(f"tags.`{name}` LIKE '{value}'" for name, value in tags.items())
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], condition, max_results=_PAGE, order_by=["attributes.start_time DESC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def experiment_id(client: MlflowClient, logger: DictConfig) -> str:
    """The id of the MLflow experiment that a logger's config names, which is made if there is none."""
    found = client.get_experiment_by_name(logger.experiment_name)
    if found:
        return str(found.experiment_id)
    local = logger.tracking_uri.startswith("sqlite:")  # any other store has a place of its own for artifacts
    return str(client.create_experiment(logger.experiment_name, artifact_location=logger.artifact_location if local else None))


def open_parent(config: DictConfig, report: dict[str, Any]) -> Run:
    """The parent run of a sweep: that of the same command on the same configs if there is one, else a new one.

    Args:
        config: the sweep's own, with its `hydra` node.
        report: what its report shows, see `Sweep`.
    """
    client = MlflowClient(config.logger.tracking_uri)
    experiment = experiment_id(client, config.logger)
    typed = [override for override in config.hydra.overrides.task if not override.startswith(("paths.", "project="))]
    sweep = fingerprint(config, OmegaConf.select(config, "hydra.sweeper.params"), sorted(typed))
    found = search(client, experiment, **{SWEEP: sweep})
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(experiment, run_name=redact("sweep " + " ".join(typed))).info.run_id
    for name, value in {SWEEP: sweep, KEYS: json.dumps(swept_keys(config)), REPORT: json.dumps(report)}.items():
        client.set_tag(run_id, name, value)
    settings = {"overrides": list(config.hydra.overrides.task), "sweeper": OmegaConf.to_container(config.hydra.sweeper, resolve=True)}
    client.log_dict(run_id, without_secrets(settings), "sweep.yaml")
    return client.get_run(run_id)


def attempts(client: MlflowClient, parent: Run, cfg: DictConfig) -> list[Run]:
    """Child runs of a point, the newest first."""
    return search(client, parent.info.experiment_id, **{PARENT: parent.info.run_id, POINT: fingerprint(cfg)})


def point_tags(parent: Run, cfg: DictConfig, hydra: DictConfig) -> dict[str, str]:
    """What marks a child run as an attempt at a point.

    Args:
        parent: the sweep's run.
        cfg: the point's own config.
        hydra: the `hydra` node that belongs to it.
    """
    given = parse(hydra.overrides.task)
    values = {key: str(given[key].get_value_element_as_str()).strip("'\"") for key in json.loads(parent.data.tags[KEYS]) if key in given}
    own = {POINT: fingerprint(cfg), VALUES: json.dumps(values), FOLDER: str(hydra.runtime.output_dir)}
    return {PARENT: parent.info.run_id, **own}


def own_run(client: MlflowClient, parent: Run, cfg: DictConfig, hydra: DictConfig) -> str:
    """The id of the child run of this attempt at a point; a new one where it came to an end before it had begun one."""
    tags = point_tags(parent, cfg, hydra)
    for run in attempts(client, parent, cfg):
        if run.data.tags[FOLDER] == tags[FOLDER]:
            return str(run.info.run_id)
    return str(client.create_run(parent.info.experiment_id, tags=tags, run_name=run_name(tags)).info.run_id)


def run_name(tags: dict[str, str]) -> str:
    """The swept values of a point, in short."""
    return short(json.loads(tags[VALUES])) or "point"
