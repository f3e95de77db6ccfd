"""Messages that an MLflow server has not accepted yet: kept in a file of the run's folder, in the order in which they were logged."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from mlflow.exceptions import MlflowException

from src.utils.atomic import write_atomic
from src.utils.secrets import redact

Message = dict[str, Any]
"""Plain values: `call`, a method of RunLogger's sender, and its arguments."""

NO_ANSWER = (MlflowException, requests.RequestException)
"""Errors of a server that cannot be reached."""

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}
_ARTIFACT_STORES = (
    *(("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("boto3.exceptions", "Boto3Error")),
    *(("azure.core.exceptions", "AzureError"), ("google.auth.exceptions", "GoogleAuthError")),
    ("google.api_core.exceptions", "GoogleAPIError"),
)


class Outbox:
    """A queue on disk for a server that does not answer; the next process of the run finds what a killed one left.

    Args:
        file: of the queue, a line per message.
        seconds_between_tries: how long to wait after a failed try.
    """

    def __init__(self, file: Path, seconds_between_tries: float = 30.0) -> None:
        self.file, self.seconds_between_tries = file, seconds_between_tries
        self._tried_at = -float("inf")
        self._repaired = False

    @property
    def waits(self) -> bool:
        """Returns whether there are messages."""
        return self.file.exists()

    @property
    def is_due(self) -> bool:
        """Returns whether it is time for the next try."""
        return time.monotonic() - self._tried_at >= self.seconds_between_tries

    def messages(self) -> Iterator[Message]:
        """Yields the messages, oldest first; not a last line that a killed process wrote in part, as its step is logged again."""
        if self.file.exists():
            with open(self.file, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield json.loads(line)

    def put(self, message: Message) -> None:
        """Appends a message; the first one starts the wait for the next try."""
        if not self.waits:
            self._tried_at = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+") as file:
            if not self._repaired:  # a partial line of a killed process would merge with this message
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                self._repaired = True
            file.write(json.dumps(message).encode() + b"\n")

    def empty(self, send: Callable[[Message], bool]) -> int:
        """Sends messages, oldest first, until `send` returns False; returns how many were sent."""
        waiting = list(self.messages())
        sent = 0
        while sent < len(waiting) and send(waiting[sent]):
            sent += 1
        self._tried_at = time.monotonic()  # after the try, which may take longer than the wait
        if sent == len(waiting):
            self.file.unlink(missing_ok=True)
        elif sent:
            write_atomic(self.file, "".join(json.dumps(message) + "\n" for message in waiting[sent:]))
        return sent


def retryable() -> tuple[type[Exception], ...]:
    """Returns errors that may pass: of the server, of the disk, and of those artifact stores whose clients are loaded."""
    stores = (getattr(sys.modules.get(module), name, None) for module, name in _ARTIFACT_STORES)
    return (*NO_ANSWER, OSError, *(error for error in stores if error is not None))


def store_errors() -> tuple[type[Exception], ...]:
    """Returns all errors of a store that cannot be used: those that may pass, and an experiment or a run that was deleted in it."""
    return (*retryable(), RuntimeError)


def is_refusal(error: Exception) -> bool:
    """Returns whether the server rejects the content of a message, so that waiting does not help."""
    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def summary(message: Message) -> str:
    """Returns what a message holds, in a few words."""
    points = [f"{point[0]} at step {point[3]}" for point in message.get("metrics", ())]
    names = [*points, *message.get("params", ()), *message.get("tags", ())] or [message.get("artifact_file") or message.get("local_path")]
    return ", ".join(map(str, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without secrets, of at most 160 characters."""
    text = redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
