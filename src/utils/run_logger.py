"""Lightning's MLflow logger for runs that stop and resume, and for servers that go away and come back."""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any

import mlflow
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from src.utils.atomic import write_atomic
from src.utils.data_contents import DataContents
from src.utils.delivery import Delivery
from src.utils.mlflow_store import UNUSABLE, default_store, experiment_id, follow_move, mlflow_name, param_value
from src.utils.outbox import NO_ANSWER, Message, Outbox, first_line
from src.utils.run_history import History, log_data, log_model, read_history, replace_table
from src.utils.secrets import redact

log = logging.getLogger(__name__)

RUN, UNSENT, UNSENT_FILES = "run.json", "unsent.jsonl", "unsent_files.jsonl"

_OWN_CALLS: dict[str, Callable[..., None]] = {"log_table": replace_table, "log_data": log_data, "log_model": log_model}

# The run waits for each call, and what cannot be sent is kept: MLflow's own minutes of retries would only cost time.
_FEW_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class RunLogger(MLFlowLogger):
    """Logs to the MLflow run that was started in a folder, if there is one, else to a new run.

    A resumed run computes again what followed its last checkpoint. Points and parameters that MLflow holds already are not sent
    again, so a history has neither gaps nor duplicates. While the server or its artifact store is away, training goes on; messages
    are kept in the folder and sent later, if need be by the next process of the run. A warning says so once. Files have a queue
    apart from values, so an artifact store that fails delays no metric.

    Args:
        experiment_name: in MLflow.
        folder: for this logger's files; None starts a new run and makes a server that does not answer an error.
        seconds_between_tries: how long a server that did not answer is left alone.
        tracking_uri: of the store; empty: the default one.
        artifact_location: of a local SQLite store; any other store has its own place for artifacts.
        system_metrics: seconds between two looks at the machine, from `watch_machine` on; None: never.
        settings: of MLFlowLogger.

    Raises:
        ConnectionError: the tracking URI is none, or its database cannot be opened.
    """

    def __init__(
        self,
        experiment_name: str,
        *,
        tracking_uri: str,
        folder: str | None = None,
        seconds_between_tries: float = 30.0,
        artifact_location: str | None = None,
        system_metrics: float | None = 10.0,
        **settings: Any,
    ) -> None:
        for name, value in _FEW_RETRIES.items():
            os.environ.setdefault(name, value)
        self._folder = None if folder is None else Path(folder)
        started = {}
        if self._folder is not None and (self._folder / RUN).exists():
            started = json.loads((self._folder / RUN).read_text(encoding="utf-8"))
        tracking_uri = tracking_uri or default_store()
        settings |= {"tracking_uri": tracking_uri, "artifact_location": artifact_location if tracking_uri.startswith("sqlite:") else None}
        try:
            super().__init__(experiment_name, run_id=started.get("run_id"), **settings)
        except UNUSABLE as error:
            raise ConnectionError(_no_store(tracking_uri, error)) from error
        self._experiment_id = started.get("experiment_id")
        self.resumed = self._run_id is not None
        queues = () if self._folder is None else (self._folder / UNSENT, self._folder / UNSENT_FILES)
        outboxes = [Outbox(file, seconds_between_tries) for file in queues]  # of values and of files, or none
        self._delivery = Delivery(self._deliver, outboxes, tracking_uri)
        self._system_metrics = system_metrics
        self._monitor: SystemMetricsMonitor | None = None
        self._history: History | None = None if self.resumed else History()

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client; the first call starts the run, or resumes it.

        Raises:
            ConnectionError: no MLflow answers at the tracking URI, to start a run with.
            RuntimeError: the experiment was deleted there.
        """
        if self._initialized:
            return self._mlflow_client
        if self.resumed:
            mlflow.set_tracking_uri(self._tracking_uri)
            self._initialized = True  # the run's history is read before the first message is sent
            return self._mlflow_client
        try:
            self._experiment_id = experiment_id(self._mlflow_client, self._experiment_name, self._artifact_location)
            client: MlflowClient = super().experiment
        except UNUSABLE as error:
            raise ConnectionError(_no_store(str(self._tracking_uri), error)) from error
        if self._folder is not None:
            write_atomic(self._folder / RUN, json.dumps({"run_id": self._run_id, "experiment_id": self._experiment_id}) + "\n")
        return client

    def start_new_run(self) -> None:
        """Leaves the folder's run as it is and starts another, tagged with the old run's id (`resumed_from`)."""
        if not self.resumed or self._folder is None:
            return
        old = str(self._run_id)
        for outbox in self._delivery.unsent():
            log.warning("messages that MLflow did not accept for run %s stay in %s", old, _renamed(outbox.file, old))
        for file in (self._folder / RUN, self._folder / UNSENT, self._folder / UNSENT_FILES):
            if file.exists():
                file.replace(_renamed(file, old))
        self.tags = {**(self.tags or {}), "resumed_from": old}
        self._run_id, self._history = None, History()
        self.resumed = self._initialized = False

    # ---- what is logged

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Logs parameters; those that a resumed run has stay, as MLflow changes none."""
        values = vars(params) if isinstance(params, Namespace) else params
        self._send({"call": "log_batch", "params": {mlflow_name(name): param_value(value) for name, value in flatten(values, "/")}})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; replaces those that a resumed run has."""
        self._send({"call": "log_batch", "tags": dict(tags)})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time() * 1000)
        points = [[mlflow_name(key), float(value), now, step or 0] for key, value in metrics.items()]
        self._send({"call": "log_batch", "metrics": points})

    @rank_zero_only
    def log_table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        """Logs a table of plain values; replaces one of that name."""
        self._send({"call": "log_table", "data": {name: list(values) for name, values in columns.items()}, "artifact_file": file})

    @rank_zero_only
    def log_text(self, text: str, file: str) -> None:
        """Logs a text file; replaces one of that name."""
        self._send({"call": "log_text", "text": text, "artifact_file": file})

    @rank_zero_only
    def log_data(self, data: DataContents, context: str) -> None:
        """Links a data set to the run; once, however often it is logged.

        Args:
            context: what it is used for: training or evaluation.
        """
        self._send({"call": "log_data", "context": context, **asdict(data)})

    @rank_zero_only
    def log_model(self, name: str, path: str, step: int) -> None:
        """Links a model to the run, with the scores that were logged at that step."""
        self._send({"call": "log_model", "name": name, "path": path, "step": step})

    @rank_zero_only
    def watch_machine(self) -> None:
        """Logs CPU, memory, disk, network and GPUs as system/..., until `finalize`."""
        if self._system_metrics is not None:
            logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # a server that goes away is warned about here
            settings: dict[str, Any] = {"sampling_interval": self._system_metrics, "tracking_uri": self._tracking_uri}
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=self.resumed, **settings)
            self._monitor.start()

    @rank_zero_only
    def log_figure(self, figure: Figure, file: str) -> None:
        """Logs a figure in the format of the file's suffix; replaces one of that name."""
        if self._folder is None:
            self.experiment.log_figure(self.run_id, figure, file, save_kwargs={"dpi": figure.dpi})
            return
        local = self._folder / "files" / file
        local.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(local, dpi=figure.dpi)
        self._send({"call": "log_artifact", "local_path": str(local), "artifact_path": str(Path(file).parent)})

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Sends what waits and ends the run: FINISHED, FAILED, or KILLED if a signal stopped it."""
        if not self._initialized:
            return
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if isinstance(sys.exc_info()[1], SIGTERMException):
            status = "KILLED"
        if not self._delivery.settle():
            return
        try:
            super().finalize(status)
        except NO_ANSWER as error:
            if self._folder is None:
                raise
            log.warning("MLflow does not answer (%s): the run is left open there", first_line(error))

    # ---- how it is sent

    def _send(self, message: Message) -> None:
        _ = self.experiment
        self._delivery.send(message)

    def _deliver(self, message: Message) -> None:
        client, run_id = self._mlflow_client, str(self._run_id)
        if self._history is None:
            self._history = self._read_history(client, run_id)
        arguments = dict(message)
        call = arguments.pop("call")
        if call == "log_batch":
            self._history.log_batch(client, run_id, **arguments)
        elif call in _OWN_CALLS:
            _OWN_CALLS[call](client, run_id, **arguments)
        elif call == "log_artifact" and not Path(arguments["local_path"]).exists():
            log.warning("%s was removed before MLflow accepted it: it is dropped", arguments["local_path"])
        else:
            getattr(client, call)(run_id, **arguments)

    def _read_history(self, client: MlflowClient, run_id: str) -> History:
        """Returns what MLflow holds of the folder's run, which is taken up again."""
        history = read_history(
            client, run_id, self._delivery.waiting_values(), str(self._tracking_uri), self._folder and self._folder / RUN
        )
        follow_move(client, client.get_experiment(client.get_run(run_id).info.experiment_id), self._artifact_location)
        client.update_run(run_id, status="RUNNING")
        return history


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts under joined names; lists and empty dicts are leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value


def _no_store(uri: str, error: Exception) -> str:
    return f"no MLflow at {redact(uri)}: {first_line(error)}. Start it, set paths.tracking_uri, or use logger=none"


def _renamed(file: Path, run_id: str) -> Path:
    return file.with_stem(f"{file.stem}_{run_id}")
