"""What MLflow holds of a run, so that a run that goes on adds to it and repeats nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from src.utils.outbox import Message


@dataclass
class Held:
    """What MLflow holds of a run that goes on: the steps of every metric, the names of the parameters.

    Nothing of a run that begins: it logs nothing twice. `until` is the last step that may come twice.
    """

    points: dict[str, set[int]] = field(default_factory=dict)
    params: frozenset[str] = frozenset()
    until: int = -1

    @classmethod
    def of(cls, client: MlflowClient, run_id: str, waiting: Iterable[Message]) -> "Held":
        data = client.get_run(run_id).data
        points = {key: {point.step for point in client.get_metric_history(run_id, key)} for key in data.metrics}
        steps = [step for found in points.values() for step in found]
        steps += [point[3] for message in waiting for point in message.get("metrics", ())]
        return cls(points, frozenset(data.params), max(steps, default=-1))

    def log_batch(
        self,
        client: MlflowClient,
        run_id: str,
        metrics: Iterable[Sequence[Any]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Sends what is not there yet; tags always.

        A message whose answer was lost may be sent again: MLflow takes a point that is the same in all, time too, as one.

        Args:
            metrics: key, value, time in ms and step of each point.
        """
        new = [Param(key, value) for key, value in (params or {}).items() if key not in self.params]
        for start in range(0, len(new), 100):  # MLflow's limit
            client.log_batch(run_id, params=new[start : start + 100])
        points = [Metric(*point) for point in metrics if point[3] not in self.points.get(point[0], ())]
        if points or tags:
            client.log_batch(run_id, metrics=points, tags=[RunTag(key, value) for key, value in (tags or {}).items()])
        for point in points:
            if point.step <= self.until:
                self.points.setdefault(point.key, set()).add(point.step)


def log_table(client: MlflowClient, run_id: str, data: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
    """A table as MLflow's own `log_table` leaves it, for its UI and `load_table`, but in the place of one that is there already.

    MLflow would add the rows to that, and so have them twice where an answer was lost.
    """
    client.log_text(run_id, pd.DataFrame(data).to_json(orient="split", index=False, date_format="iso"), artifact_file)
    tables = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (table := {"path": artifact_file, "type": "table"}) not in tables:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, table]))
