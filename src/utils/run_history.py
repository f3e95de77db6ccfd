"""Reads what MLflow holds of a resumed run, so that nothing is sent twice; and makes the calls that replace what a run logged before."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_DATASET_NAME_SIZE

from src.utils.outbox import Message
from src.utils.secrets import redact

MACHINE = "system/"
"""Metrics of the machine, which MLflow's own thread logs at steps of its own."""


class History:
    """The metrics that MLflow holds of a resumed run; empty for a new run, which logs nothing twice.

    Attributes:
        steps: of each metric's points.
        params: names of the parameters.
        last_step: after which no point can be a duplicate.
    """

    def __init__(self) -> None:
        self.steps: dict[str, set[int]] = {}
        self.params: set[str] = set()
        self.last_step = -1

    def read(self, client: MlflowClient, run_id: str, waiting: Iterable[Message]) -> None:
        data = client.get_run(run_id).data
        self.steps = {
            key: {point.step for point in client.get_metric_history(run_id, key)} for key in data.metrics if not key.startswith(MACHINE)
        }
        self.params = set(data.params)
        queued = {point[3] for message in waiting for point in message.get("metrics", ())}
        self.last_step = max(queued.union(*self.steps.values()), default=-1)

    def log_batch(
        self,
        client: MlflowClient,
        run_id: str,
        metrics: Iterable[Sequence[Any]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Sends what MLflow does not hold yet; tags always.

        A message whose answer was lost may be sent again: MLflow stores a point once that is equal in key, value, time and step.

        Args:
            metrics: key, value, time in ms and step of each point.
        """
        new = [Param(key, value) for key, value in (params or {}).items() if key not in self.params]
        for start in range(0, len(new), 100):  # MLflow's limit
            client.log_batch(run_id, params=new[start : start + 100])
        points = [Metric(*point) for point in metrics if point[3] not in self.steps.get(point[0], ())]
        if points or tags:
            client.log_batch(run_id, metrics=points, tags=[RunTag(key, value) for key, value in (tags or {}).items()])
        for point in points:
            if point.step <= self.last_step:
                self.steps.setdefault(point.key, set()).add(point.step)


def read_history(client: MlflowClient, run_id: str, waiting: Iterable[Message], store: str, run_file: Path | None) -> History:
    """Returns what MLflow holds of a run, and which of its values wait.

    Args:
        store: URI of the store.
        run_file: names the run in the folder that started it.

    Raises:
        RuntimeError: the store has no such run, or it was deleted there.
    """
    history = History()
    try:
        history.read(client, run_id, waiting)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" or run_file is None:
            raise
        raise RuntimeError(
            f"MLflow at {redact(store)} has no run {run_id}, which this folder started: set paths.tracking_uri to its "
            f"store, or remove {run_file} to log to a new run"
        ) from error
    if client.get_run(run_id).info.lifecycle_stage == LifecycleStage.DELETED:
        uri = redact(store)
        raise RuntimeError(
            f"the MLflow run {run_id}, which this folder started, was deleted at {uri}: restore it (MLFLOW_TRACKING_URI={uri!r} "
            f"mlflow runs restore --run-id {run_id}), or remove {run_file} to log to a new run"
        )
    return history


def log_data(client: MlflowClient, run_id: str, context: str, name: str, source: str, digest: str, **counts: int) -> None:
    """Links a data set to a run, with its counts as the profile; MLflow keeps one of that name and digest."""
    known = {"source_type": "local", "source": json.dumps({"uri": source}), "profile": json.dumps({k: v for k, v in counts.items() if v})}
    data = Dataset(name[:MAX_DATASET_NAME_SIZE], (digest or "unknown")[:MAX_DATASET_DIGEST_SIZE], **known)
    client.log_inputs(run_id, [DatasetInput(data, [InputTag(MLFLOW_DATASET_CONTEXT, context)])])


def log_model(client: MlflowClient, run_id: str, name: str, path: str, step: int) -> None:
    """Links a model to a run: its place, and the scores of the run (mteb/..., test/...) that were measured at its step."""
    run = client.get_run(run_id)
    full = re.sub(r"[^\w-]+", "-", f"{run.info.run_name}-{name}")
    shown: dict[str, Any] = {"tags": {"path": path}, "params": {"path": path, "rollout_batch": str(step)}, "model_type": "encoder"}
    model = client.create_logged_model(run.info.experiment_id, full, run_id, **shown).model_id
    client.finalize_logged_model(model, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model, step)])
    scores = [key for key in run.data.metrics if key.startswith(("mteb/", "test/")) and not key.startswith("test/base")]
    points = [point for key in scores for point in client.get_metric_history(run_id, key) if point.step == step]
    linked = [Metric(point.key, point.value, point.timestamp, point.step, model_id=model) for point in points]  # equal points are one
    if linked:
        client.log_batch(run_id, metrics=linked)


def replace_table(client: MlflowClient, run_id: str, data: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
    """Logs a table in the format of MLflow's `log_table`, replacing one of that name, where MLflow would append the rows."""
    client.log_text(run_id, pd.DataFrame(data).to_json(orient="split", index=False, date_format="iso"), artifact_file)
    tables = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (table := {"path": artifact_file, "type": "table"}) not in tables:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, table]))
