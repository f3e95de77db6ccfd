"""Names and lengths that MLflow takes, and stores that people changed: deleted experiments, folders that were moved."""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import sqlalchemy
from mlflow.entities import Experiment, LifecycleStage
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH
from sqlalchemy.exc import SQLAlchemyError

from src.utils.outbox import NO_ANSWER
from src.utils.secrets import redact

log = logging.getLogger(__name__)

if os.environ.get("MLFLOW_TRACKING_URI") == "":  # configs/paths would take it for a store
    del os.environ["MLFLOW_TRACKING_URI"]

UNUSABLE = (*NO_ANSWER, SQLAlchemyError, ImportError)
"""Errors of a store that cannot be opened: no server, a URI that is none, a damaged database, a database without its driver."""

_REFUSED = re.compile(r"[^\w/. -]|^\.\.")
"""What MLflow takes in no name of a metric or a parameter. Letters and digits of any script are taken; combining marks are not."""


_NOTE = """Runs of `python train.py` and `python evaluate.py` with this `project=`.

Compare trained runs by `test/<method>/average` (held-out tasks, at the end) and `mteb/average` (validation tasks, while training); then
`reward/total/mean`, `reward/<term>/within_group_std` (what moves the policy gradient), `rollout/rationale_length` and `update/grad_norm`.
`rationales/` in a run's artifacts has what was written, step by step; `report.html` has all of it on a page. `python -m
src.callbacks.compare_runs RUN RUN` prints what differs between two runs."""


_TAGS = {MLFLOW_RUN_NOTE: _NOTE, "mlflow.experimentKind": "custom_model_development"}
"""Of a new experiment. By the second MLflow's UI opens its pages for model training; else it may open those for agents and prompts."""


def default_store() -> str:
    """Returns where runs are logged by default, as configs/paths says."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(__file__).resolve().parents[2]}/mlflow.db"


def mlflow_name(name: str) -> str:
    """Returns the name under which MLflow takes a metric or a parameter.

    That is the same, or one without what MLflow refuses and with a digest, so that names differ. It refuses paths that can be shorter.
    """
    plain = _REFUSED.sub("_", "/".join(part for part in name.split("/") if part not in ("", ".", "..")))
    if name and plain == name and len(name) <= MAX_ENTITY_KEY_LENGTH:
        return name
    return f"{plain[: MAX_ENTITY_KEY_LENGTH - 7]}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def param_value(value: Any) -> str:
    """Returns the text of a parameter; beyond MLflow's limit it is cut, and ends in a mark with the length of the whole."""
    text = str(value)
    if len(text) <= MAX_PARAM_VAL_LENGTH:
        return text
    mark = f" … [cut, of {len(text)} characters; the whole is in config.yaml]"
    return text[: MAX_PARAM_VAL_LENGTH - len(mark)] + mark


def experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Returns the id of the experiment of a name; makes it, with a description, if there is none.

    Args:
        artifacts: where those of a new experiment go, and of one in a local SQLite store that was moved; None: the store's own place.

    Raises:
        RuntimeError: the experiment was deleted in MLflow, which keeps its name and takes no run.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=artifacts, tags=_TAGS))
    if experiment.lifecycle_stage != LifecycleStage.DELETED:
        follow_move(client, experiment, artifacts)
        return str(experiment.experiment_id)
    number, store = experiment.experiment_id, redact(client.tracking_uri)
    raise RuntimeError(
        f"the MLflow experiment {name!r} at {store} was deleted, and MLflow keeps its name: restore it (MLFLOW_TRACKING_URI={store!r} "
        f"mlflow experiments restore -x {number}), delete it for good (mlflow gc --backend-store-uri {store!r} --experiment-ids {number})"
        ", or log to another with project="
    )


def follow_move(client: MlflowClient, experiment: Experiment, artifacts: str | None) -> None:
    """Corrects the places of artifacts in a local SQLite store whose folder was moved: those of all its experiments and runs.

    MLflow writes absolute paths and has no call to change them, so a new run would make the old folder again. Nothing is changed while
    the old folder exists, or where the artifacts did not move along.
    """
    if artifacts is None or not client.tracking_uri.startswith("sqlite:"):
        return
    old, new = experiment.artifact_location, artifacts
    if old == new or not old.startswith("file:"):
        return
    engine = sqlalchemy.create_engine(client.tracking_uri)
    values = {"new": new, "old": old, "cut": len(old) + 1}
    with engine.begin() as database:
        below = "substr({0}, 1, :cut) = :old || '/'"
        runs = (
            database.execute(sqlalchemy.text(f"SELECT artifact_uri FROM runs WHERE {below.format('artifact_uri')}"), values).scalars().all()
        )
        if moved := not _folder(old).exists() and (not runs or any(_folder(new + uri.removeprefix(old)).exists() for uri in runs)):
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")):
                change = f"UPDATE {table} SET {column} = :new || substr({column}, :cut) WHERE {column} = :old OR {below.format(column)}"
                database.execute(sqlalchemy.text(change), values)
    engine.dispose()
    if moved:
        log.warning("MLflow looked for artifacts in %s, which is gone: this store's are in %s from now on", old, new)
    else:
        log.warning("artifacts of the MLflow experiment %s go to %s, as when it was begun, and not to %s", experiment.name, old, new)


def _folder(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path))
