"""What a training run logged to MLflow, read back."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.callbacks.rationale_table import Rationale
from src.utils.plots import Curve, Similarities
from src.utils.quiet import quiet_mlflow

_NOT_REWARDS = ("step", "text", "rationale", "length", "finished")

Table = list[dict[str, Any]]
"""Rows."""


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        run_id, name, status: in MLflow.
        params, tags: as logged.
        curves: metrics by name, sorted.
        rationales: (step, rationale) by text, in the order of the steps.
        similarities: by step.
        scores: the table of held-out tasks; empty where there is none.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    curves: dict[str, Curve]
    rationales: dict[str, list[tuple[int, Rationale]]]
    similarities: dict[int, Similarities]
    scores: Table


def read_run(client: MlflowClient, run_id: str) -> RunData:
    """Reads all that the report shows of a run.

    Raises:
        ValueError: no such run in that store.
        mlflow.exceptions.MlflowException, requests.RequestException: the store does not answer.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"no run {run_id!r} in {client.tracking_uri}: {error.message}") from error
    histories = {name: client.get_metric_history(run_id, name) for name in sorted(run.data.metrics)}
    rationales: dict[str, list[tuple[int, Rationale]]] = {}
    for step, table in _tables(client, run_id, "rationales", r"step_(\d+)\.json$").items():
        for row in table:
            written = (row["text"], row["rationale"], int(row["length"]), bool(row["finished"]))
            rewards = {name: float(row[name]) for name in row if name not in _NOT_REWARDS}
            rationales.setdefault(row["text"], []).append((step, Rationale(*written, rewards)))
    similarities: dict[int, dict[str, list[float]]] = {}
    for step, table in _tables(client, run_id, "similarities", r"step_(\d+)\.json$").items():
        for row in table:
            similarities.setdefault(step, {}).setdefault(row["kind"], []).append(float(row["cosine"]))
    return RunData(
        run_id=run_id,
        name=str(run.info.run_name),
        status=str(run.info.status),
        params=dict(sorted(run.data.params.items())),
        tags=dict(run.data.tags),
        curves={name: sorted((point.step, point.value) for point in history) for name, history in histories.items()},
        rationales=rationales,
        similarities=dict(similarities),
        scores=_tables(client, run_id, "report", r"test_scores()\.json$").get(0, []),
    )


def _tables(client: MlflowClient, run_id: str, folder: str, name: str) -> dict[int, Table]:
    """Returns the tables of an artifact folder by the number that `name` finds in theirs (none: 0), sorted."""
    found = {}
    with TemporaryDirectory() as place, quiet_mlflow():
        for artifact in client.list_artifacts(run_id, folder):
            if match := re.search(name, artifact.path):
                file = client.download_artifacts(run_id, artifact.path, place)
                table = json.loads(Path(file).read_text(encoding="utf-8"))
                found[int(match[1] or 0)] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return dict(sorted(found.items()))
