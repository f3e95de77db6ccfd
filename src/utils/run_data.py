"""What a training run left in MLflow, read back."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.utils.plots import Curve, Similarities
from src.utils.quiet import quiet_mlflow

_STEP = re.compile(r"step_(\d+)\.json$")
_WRITTEN = ("step", "text", "rationale", "length", "finished")  # other columns of a table of rationales are reward terms


@dataclass(frozen=True)
class WrittenRationale:
    """A rationale at one step.

    Attributes:
        step: rollout batches done.
        rationale: as decoded.
        length: tokens.
        finished: whether it ended before the length limit.
        earned: reward terms before weighting, and `total`; empty where none were logged.
    """

    step: int
    rationale: str
    length: int
    finished: bool
    earned: dict[str, float]


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        run_id, name, status: in MLflow.
        params, tags: as they were logged.
        curves: metrics by name, in the order of their names.
        rationales: by watched text, in the order of their steps.
        similarities: by step.
        scores: columns and rows of the table of held-out tasks; None where there is none.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    curves: dict[str, Curve]
    rationales: dict[str, list[WrittenRationale]]
    similarities: dict[int, Similarities]
    scores: tuple[list[str], list[list[Any]]] | None


def read_run(client: MlflowClient, run_id: str) -> RunData:
    """All that a report shows of a run.

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
    curves = {name: sorted((point.step, point.value) for point in history) for name, history in histories.items()}
    rationales: dict[str, list[WrittenRationale]] = {}
    for table in _tables(client, run_id, "rationales").values():
        for row in table:
            earned = {name: float(value) for name, value in row.items() if name not in _WRITTEN}
            written = WrittenRationale(int(row["step"]), row["rationale"], int(row["length"]), bool(row["finished"]), earned)
            rationales.setdefault(row["text"], []).append(written)
    scores = _tables(client, run_id, "report", re.compile(r"()test_scores\.json$"))
    rows = next(iter(scores.values()), [])
    return RunData(
        run_id=run_id,
        name=str(run.info.run_name),
        status=str(run.info.status),
        params=dict(sorted(run.data.params.items())),
        tags=dict(run.data.tags),
        curves=dict(curves),
        rationales=rationales,
        similarities={step: _by_kind(table) for step, table in _tables(client, run_id, "similarities").items()},
        scores=(list(rows[0]), [list(row.values()) for row in rows]) if rows else None,
    )


def _tables(client: MlflowClient, run_id: str, folder: str, name: re.Pattern[str] = _STEP) -> dict[int, list[dict[str, Any]]]:
    """Tables of an artifact folder by the number in their names, in its order; a table is a list of rows."""
    found = {}
    with TemporaryDirectory() as place, quiet_mlflow():
        for artifact in client.list_artifacts(run_id, folder):
            if match := name.search(artifact.path):
                file = client.download_artifacts(run_id, artifact.path, place)
                table = json.loads(Path(file).read_text(encoding="utf-8"))
                found[int(match[1] or 0)] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return dict(sorted(found.items()))


def _by_kind(table: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    kinds: dict[str, list[float]] = {}
    for row in table:
        kinds.setdefault(row["kind"], []).append(float(row["cosine"]))
    return kinds
