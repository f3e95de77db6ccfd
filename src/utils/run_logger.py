"""Lightning's MLflow logger for runs that stop and go on, and for servers that go away and come back."""

import json
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

import mlflow
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.utils.mlflow_errors import NO_ANSWER, is_refusal, named, passing, short
from src.utils.mlflow_history import Held, log_table
from src.utils.outbox import Message, Outbox
from src.utils.secrets import redact

log = logging.getLogger(__name__)

RUN, UNSENT, UNSENT_FILES = "run.json", "unsent.jsonl", "unsent_files.jsonl"

# The run waits for each call: what cannot be sent soon is kept, so MLflow's own minutes of trying again would only cost time.
_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class RunLogger(MLFlowLogger):
    """Logs to the MLflow run of a folder: the one that was begun in it, if there is one.

    A run that goes on computes again what came after its last checkpoint. MLflow takes every point and every file once: what
    it has already is left out, so a history has neither gaps nor doubles. While a server does not answer, or its store of files
    takes none, training goes on, and what is logged is kept in the folder and sent later, if need be by the next process. That is
    said once. Files wait by themselves: a store that takes none keeps back no metric.

    Args:
        experiment_name: in MLflow.
        folder: of this logger's own files; None begins a new run, and lets a server's silence be an error.
        seconds_between_tries: how long a server that did not answer is left alone.
        settings: of MLFlowLogger.
    """

    def __init__(self, experiment_name: str, *, folder: str | None = None, seconds_between_tries: float = 30.0, **settings: Any) -> None:
        for name, value in _IMPATIENCE.items():
            os.environ.setdefault(name, value)
        self._folder = None if folder is None else Path(folder)
        begun = None if self._folder is None else self._folder / RUN
        if begun is not None and begun.exists():
            own = json.loads(begun.read_text(encoding="utf-8"))
            super().__init__(experiment_name, run_id=own["run_id"], **settings)
            self._experiment_id = own["experiment_id"]
        else:
            super().__init__(experiment_name, **settings)
        self.resumed = self._run_id is not None
        kept = () if self._folder is None else (self._folder / UNSENT, self._folder / UNSENT_FILES)
        self._outboxes = [Outbox(file, seconds_between_tries) for file in kept]  # of values and of files, or none
        self._said: set[str] = set()  # what keeps MLflow from taking something
        self._held: Held | None = None if self.resumed else Held()

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client; the first call makes the run, or remembers it.

        Raises:
            ConnectionError: there is no MLflow at the tracking URI to begin a run with.
        """
        if self._initialized:
            return self._mlflow_client
        if self.resumed:
            mlflow.set_tracking_uri(self._tracking_uri)
            self._initialized = True  # what the run holds is asked for with the first message
            return self._mlflow_client
        try:
            client: MlflowClient = super().experiment
        except NO_ANSWER as error:
            where = redact(self._tracking_uri)
            raise ConnectionError(f"no MLflow at {where}: {short(error)}. Start it, set paths.tracking_uri, or use logger=none") from error
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = self._folder / "run.json.partial"
            aside.write_text(json.dumps({"run_id": self._run_id, "experiment_id": self._experiment_id}) + "\n", encoding="utf-8")
            aside.replace(self._folder / RUN)
        return client

    def begin_anew(self) -> None:
        """Leaves the run that the folder began as it is, and begins another, tagged with it (`resumed_from`)."""
        if not self.resumed or self._folder is None:
            return
        begun = str(self._run_id)
        for outbox in self._last_tries():
            kept = outbox.file.with_stem(f"{outbox.file.stem}_{begun}")
            log.warning("what MLflow was not sent of run %s stays in %s", begun, kept)
        for file in (self._folder / RUN, self._folder / UNSENT, self._folder / UNSENT_FILES):
            if file.exists():
                file.replace(file.with_stem(f"{file.stem}_{begun}"))
        self.tags = {**(self.tags or {}), "resumed_from": begun}
        self._run_id, self._held = None, Held()
        self.resumed = self._initialized = False

    # ---- what is logged

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """As Lightning has it; those that a resumed run began with stay, as MLflow changes none."""
        plain = _flatten_dict(_convert_params(params))
        self._send({"call": "log_batch", "params": {key: str(value)[:250] for key, value in plain.items()}})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; those of a resumed run are replaced."""
        self._send({"call": "log_batch", "tags": dict(tags)})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time() * 1000)
        named = {re.sub(r"[^a-zA-Z0-9_/. -]+", "", key): float(value) for key, value in metrics.items()}
        self._send({"call": "log_batch", "metrics": [[key, value, now, step or 0] for key, value in named.items()]})

    @rank_zero_only
    def log_table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        """A table of plain values; one that is there already is replaced."""
        self._send({"call": "log_table", "data": {name: list(values) for name, values in columns.items()}, "artifact_file": file})

    @rank_zero_only
    def log_text(self, text: str, file: str) -> None:
        """A text file; one that is there already is replaced."""
        self._send({"call": "log_text", "text": text, "artifact_file": file})

    @rank_zero_only
    def log_figure(self, figure: Figure, file: str) -> None:
        """A figure, as the kind of image that the file's name says; one that is there already is replaced."""
        if self._folder is None:
            self.experiment.log_figure(self.run_id, figure, file, save_kwargs={"dpi": figure.dpi})
            return
        local = self._folder / "files" / file
        local.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(local, dpi=figure.dpi)
        self._send({"call": "log_artifact", "local_path": str(local), "artifact_path": str(Path(file).parent)})

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Sends what waits and closes the run: FINISHED, FAILED, or KILLED if a signal stopped it.

        What a server that stays away is not sent remains in the folder.
        """
        if not self._initialized:
            return
        if isinstance(sys.exc_info()[1], SIGTERMException):
            status = "KILLED"
        waiting = self._last_tries()
        if waiting:
            away, places = waiting[0] is self._outboxes[0], " and ".join(str(outbox.file) for outbox in waiting)
            what = "does not answer" if away else "does not store files"
            log.warning("MLflow still %s: what it was not sent is in %s, and goes with the next ckpt_path=last", what, places)
            if away:
                return
        try:
            super().finalize(status)
        except NO_ANSWER as error:
            if not self._outboxes:
                raise
            log.warning("MLflow does not answer (%s): the run is left open there", short(error))

    # ---- how it is sent

    def _send(self, message: Message) -> None:
        _ = self.experiment
        if not self._outboxes:
            self._deliver(message)
            return
        values, files = self._outboxes
        outbox = values if message["call"] == "log_batch" else files
        away = self._still_waits(values)  # then so is its store of files, which is not tried
        if away or (self._still_waits(files) and outbox is files):
            outbox.put(message)
            return
        error = self._try(message)
        if error is not None:
            outbox.put(message)
            what = "does not answer" if isinstance(error, NO_ANSWER) else "does not store files"
            if what not in self._said:
                self._said.add(what)
                log.warning(
                    "MLflow at %s %s (%s): training goes on; what is logged is kept in %s, and sent when it does",
                    *(redact(self._tracking_uri), what, short(error), outbox.file),
                )

    def _still_waits(self, outbox: Outbox) -> bool:
        return outbox.waits and not (outbox.is_due and self._empty(outbox))

    def _last_tries(self) -> list[Outbox]:
        """The outboxes that wait though they were tried now; files are not where values wait, as nobody answers."""
        waiting: list[Outbox] = []
        for outbox in self._outboxes:
            if outbox.waits and (waiting or not self._empty(outbox)):
                waiting.append(outbox)
        return waiting

    def _empty(self, outbox: Outbox) -> bool:
        """Sends what waits; whether all of it could be sent. What the server calls wrong is left out: it would never be taken."""

        def send(message: Message) -> bool:
            try:
                return self._try(message) is None
            except MlflowException as error:
                log.warning("MLflow refuses %s, which waited (%s): it is left out", named(message), short(error))
                return True

        sent = outbox.empty(send)
        if sent and not outbox.waits:
            self._said.clear()
            log.warning("MLflow answers again: %d entries that waited were sent", sent)
        return not outbox.waits

    def _try(self, message: Message) -> Exception | None:
        """Why a message could not be sent, or None; what the server calls wrong is raised, as waiting would not mend it."""
        try:
            self._deliver(message)
        except passing() as error:
            if is_refusal(error):
                raise
            return error
        return None

    def _deliver(self, message: Message) -> None:
        client, run_id = self._mlflow_client, str(self._run_id)
        if self._held is None:
            self._held = self._recall(client, run_id)
        arguments = dict(message)
        call = arguments.pop("call")
        if call == "log_batch":
            self._held.log_batch(client, run_id, **arguments)
        elif call == "log_table":
            log_table(client, run_id, **arguments)
        elif call == "log_artifact" and not Path(arguments["local_path"]).exists():
            log.warning("%s is gone before MLflow was sent it: it is left out", arguments["local_path"])
        else:
            getattr(client, call)(run_id, **arguments)

    def _recall(self, client: MlflowClient, run_id: str) -> Held:
        try:
            held = Held.of(client, run_id, self._outboxes[0].messages() if self._outboxes else ())
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" or self._folder is None:
                raise
            where = redact(self._tracking_uri)
            raise RuntimeError(
                f"MLflow at {where} has no run {run_id}, which this folder began: set paths.tracking_uri to where it is, or remove "
                f"{self._folder / RUN} to log to a new run"
            ) from error
        client.update_run(run_id, status="RUNNING")
        return held
