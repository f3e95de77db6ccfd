"""Checks that this Python can run the project. Any Python from 3.6 on reads this file, and it needs no package."""

import sys
from importlib.util import find_spec

_NEEDED = ("torch", "lightning", "transformers", "hydra", "mlflow", "mteb")


def require_ready(program: str) -> None:
    """Ends the process with one line (SystemExit) if Python is too old or the dependencies are not installed for it."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            f"{program}: Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}: `make train PYTHON=python3.12`"
        )
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"{program}: {', '.join(missing)}: not installed for {sys.executable}; source .venv/bin/activate, or `make train` first")
