"""Runs measurements in processes of their own: what one of them leaves in memory is in no other's way."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.speed.subject import ROOT

NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Has glibc give large pieces of freed memory back at once: the peak is then of what is in use, and slower to reach."""


def child(command: Sequence[str], settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that a command prints as its last line.

    Args:
        settings: environment variables of it.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PROJECT_ROOT": str(ROOT), **(settings or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(done.stderr.strip().splitlines()[-15:]))
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
