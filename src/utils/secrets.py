"""Passwords, tokens and keys stay in memory: none reaches a log, a saved config or the tracking store."""

import logging
import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TextIO

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_LEAST = 6  # characters: the value of a secret variable that is shorter would be found in any text

_NAMES = r"(?:password|passwd|secret|token|api_?key|access_?key|private_?key|credentials?)"
_SECRET_KEY = re.compile(rf"(^|[._-]){_NAMES}$|(^|[._-])(secret_|aws_)\w*key\w*$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"(^|_){_NAMES}(_|$)", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^/@\s:'\"]*):[^/\s'\"]*@")
_TOKEN_FOR_USER = re.compile(r"(://)(?!\*\*\*@)[^/@\s:'\"]+@")
_SECRET_QUERY = re.compile(rf"([?&](?:[\w-]*{_NAMES}|sig|signature|x-amz-signature|x-amz-security-token)=)[^&\s'\"]*", re.IGNORECASE)
_HEADER = re.compile(r"(Authorization['\"]?\s*[:=]\s*['\"]?(?:Bearer|Basic)\s+)[^\s'\"]+", re.IGNORECASE)


def redact(text: str) -> str:
    """A text without its secrets: `http://me:pw@host` becomes `http://me:***@host`, `https://key@host` `https://***@host`.

    Hidden are what a URI holds before its host, the secret parameters of its query, an Authorization header's value, and the
    values of environment variables that are named like secrets (HF_TOKEN, MLFLOW_TRACKING_PASSWORD), wherever they turn up.
    """
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    text = _PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _TOKEN_FOR_USER.sub(rf"\1{HIDDEN}@", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _SECRET_QUERY.sub(rf"\1{HIDDEN}", text))


def environment_secrets() -> list[str]:
    """Values of the environment variables that are named like secrets, the longest first; paths and short ones are none."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _LEAST}
    return sorted((value for value in values if not value.startswith(("/", "~")) and not value.isdigit()), key=len, reverse=True)


def without_secrets(config: Any, key: str = "") -> Any:
    """A plain container (dicts, lists, scalars) with the values of secret-sounding keys and all that `redact` hides replaced."""
    if isinstance(config, dict):
        return {name: without_secrets(value, str(name)) for name, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value, key) for value in config]
    if config is not None and _SECRET_KEY.search(key):
        return HIDDEN
    return redact(config) if isinstance(config, str) else config


def keep_secrets(argv: list[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Called before anything is composed: secrets on the command line and in what is printed stay where they are.

    A setting with a secret (`paths.tracking_uri=http://me:pw@host`) moves into an environment variable of this process and of
    those that it starts, and an interpolation takes its place in `argv`: so Hydra's saved configs, its errors and a sweep's
    list of jobs know the interpolation alone. Standard output and error hide what `redact` hides.
    """
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    program, parser = Path(argv[0]).name, OverridesParser.create()
    for place, argument in enumerate(argv[1:], start=1):
        name, _, value = argument.partition("=")
        by_name = bool(_SECRET_KEY.search(name))
        if argument.startswith("-") or value.startswith("${") or (not (by_name and value) and value == redact(value)):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise SystemExit(f"{program}: {redact(argument)} cannot be read: put its value in quotes ('{name}=\"...\"')") from error
        if override.is_sweep_override():
            raise SystemExit(f"{program}: {name} holds a secret, and a sweep over it would write it down; give it one value")
        variable = f"GRACE_{'SECRET' if by_name else 'SETTING'}_{place}"
        environ[variable] = str(override.value())
        argv[place] = f"{name}=${{oc.env:{variable}}}"


class RedactedStream:
    """A text stream that hides what `redact` hides in each thing written to it; in all else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(redact(text))

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RedactingFormatter(logging.Formatter):
    """Lines of a log file without secrets, those of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RedactSavedConfigs(Callback):
    """Takes secrets that stand in YAML files out of the copies that Hydra saves, before the job begins."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.output_subdir is not None:
            _redact_files(Path(config.hydra.runtime.output_dir, config.hydra.output_subdir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        _redact_files(Path(config.hydra.sweep.dir))


def _redact_files(folder: Path) -> None:
    for file in folder.glob("*.yaml"):
        saved = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        clean = without_secrets(saved)
        if clean != saved:
            file.write_text(OmegaConf.to_yaml(OmegaConf.create(clean)), encoding="utf-8")
