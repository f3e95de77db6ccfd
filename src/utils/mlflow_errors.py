"""What goes wrong on the way to MLflow: what waiting may mend, what it never will, and how it is said."""

import sys

import requests
from mlflow.exceptions import MlflowException

from src.utils.outbox import Message
from src.utils.secrets import redact

NO_ANSWER = (MlflowException, requests.RequestException)
"""Of the server."""

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}
_ARTIFACT_STORES = (
    *(("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("boto3.exceptions", "Boto3Error")),
    *(("azure.core.exceptions", "AzureError"), ("google.auth.exceptions", "GoogleAuthError")),
    ("google.api_core.exceptions", "GoogleAPIError"),
)


def passing() -> tuple[type[Exception], ...]:
    """Errors that may pass: of the server, of the disk, and of stores of files, as far as their clients are at work here."""
    stores = (getattr(sys.modules.get(module), name, None) for module, name in _ARTIFACT_STORES)
    return (*NO_ANSWER, OSError, *(error for error in stores if error is not None))


def is_refusal(error: Exception) -> bool:
    """Whether the server calls wrong what it was sent: waiting would not mend it."""
    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def named(message: Message) -> str:
    """What a message holds, in a few words."""
    points = [f"{point[0]} at step {point[3]}" for point in message.get("metrics", ())]
    names = [*points, *message.get("params", ()), *message.get("tags", ())] or [message.get("artifact_file") or message.get("local_path")]
    return ", ".join(map(str, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def short(error: Exception) -> str:
    """Its first line, without secrets."""
    text = redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
