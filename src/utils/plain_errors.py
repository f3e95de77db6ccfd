"""Errors as one line on the terminal, with their traceback in the log file of the run."""

import errno
import logging
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from src.utils.secrets import redact

HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
"""Errors of the hub's client: absent, out of reach, no name of the hub. The bases are those of the HTTP library that it uses."""

_ROOT = Path(__file__).resolve().parents[2]
_OURS = (ValueError, LookupError, RuntimeError, TypeError, ImportError)
_NETWORK = {"httpx", "httpx2", "requests", "urllib3", "huggingface_hub"}
_TO_APPEND = re.compile(r"To append to your (config|default list) use \+.*?(?= full_key:|$)")
"""Hydra's advice on a setting that does not exist."""
_HYDRA, _BY_US = "HYDRA_FULL_ERROR", "GRACE_PLAIN_ERRORS"  # the second tells child processes that the user did not set the first


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Ends the process with one line where an error is of the settings, the data or the machine; any other keeps its traceback.

    The traceback of the former goes to the run's log file; HYDRA_FULL_ERROR=1 shows it on the terminal.

    Raises:
        SystemExit: of such an error; see `said`.
    """
    before = {name: os.environ.get(name) for name in (_HYDRA, _BY_US)}
    full = before[_HYDRA] == "1" and before[_BY_US] is None
    os.environ |= {_HYDRA: "1"} | ({} if full else {_BY_US: "1"})  # else Hydra catches errors and prints a part of their tracebacks
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"{program}: stopped by Ctrl-C") from None
    except Exception as error:
        line = said(error)
        if line is None or full:
            raise
        _write_to_log_file(error)
        raise SystemExit(f"{program}: {redact(line)}") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def said(error: BaseException) -> str | None:
    """Returns an error in one line; None if it takes its traceback to understand it.

    In one line: what this project raises itself, which says what to do; errors of Hydra's configs, of files and the network; no space, no
    memory.
    """
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = Path(str(error.filename or "."))
        return f"no space left for {place} ({_free(place)}): make room, and go on with ckpt_path=last"
    if _raised_here(error) and isinstance(error, (OSError, *_OURS)):
        return text
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _TO_APPEND.sub("There is no such setting in what these choices compose to: see --cfg job.", " ".join(text.split()))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({first}): dry_run=true plans what fits; module.micro_batch_tokens= is the first to lower"
    if isinstance(error, HUB_ERRORS) or type(error).__module__.partition(".")[0] in _NETWORK:
        return first
    return None


def reason(error: Exception) -> str:
    """Returns the first line of an error's message; its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _raised_here(error: BaseException) -> bool:
    """Returns whether the statement that raised an error is a `raise` of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    place = Path(frames[-1].filename) if frames else Path("/")
    ours = place.is_relative_to(_ROOT) and ".venv" not in place.relative_to(_ROOT).parts
    return ours and (frames[-1].line or "").startswith("raise ")


def _free(place: Path) -> str:
    while not place.exists():
        place = place.parent
    return f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free"


def _write_to_log_file(error: BaseException) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            trace = (type(error), error, error.__traceback__)
            handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, "ended by an error", (), trace))
