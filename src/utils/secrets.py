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
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.utils.secret_names import environment_secrets, is_secret, spellings

HIDDEN = "***"

# A URI's user and password. What begins with digits is a port, and no password; one that holds a space or a slash ends at the first @.
_PORT = r"(?!\d{1,5}(?!\w))"
_PASSWORDS = (
    re.compile(r"(://[^/@\s:'\"]*):[^/\s'\"]+@"),
    re.compile(rf"(://[^/@\s:'\"]+):{_PORT}[^\s@]+@"),
    re.compile(rf"(://[^/@\s:'\"]+):{_PORT}(?!\s)[^@\n]{{1,100}}@"),
)
_TOKEN_AS_USER = re.compile(
    r"(://)(?:[^/@\s:'\"]+:@|(?:gh[a-z]_|github_pat_|glpat-|hf_|sk-|xox|npm_|pypi-|dapi)[^/@\s:'\"]*(?::[^/@\s'\"]*)?@|[^/@\s:'\"]+:x-oauth-basic@)"
)
_TOKEN_FOR_USER = re.compile(r"(://)(?!\*\*\*@)[^/@\s:'\"]+@")
_QUERY_NAMES = r"(?:[\w-]*(?:password|passwd|secret|token|api_?key|access_?key|private_?key|credentials?)|sig|signature)"
_SECRET_QUERY = re.compile(rf"([?&](?:{_QUERY_NAMES}|x-amz-signature|x-amz-security-token)=)[^&\s'\"]*", re.IGNORECASE)
_CONNECTION = re.compile(r"((?:AccountKey|SharedAccessKey|SharedAccessSignature|;\s*(?:password|pwd))=)[^;\s'\"]+", re.IGNORECASE)
_HEADER = re.compile(r"(Authorization['\"]?\s*[:=]\s*['\"]?(?:Bearer|Basic)\s+)[^\s'\"]+", re.IGNORECASE)


def redact(text: str) -> str:
    """A text without its secrets: `http://me:pw@host` becomes `http://me:***@host`, `https://key@host` `https://***@host`.

    Hidden are what a URI holds before its host, the secret parameters of its query, keys of a connection string, an
    Authorization header's value, and the values of environment variables that are named like secrets (HF_TOKEN, PGPASSWORD),
    wherever they turn up and however they are quoted there.
    """
    for secret in environment_secrets():
        for spelling in spellings(secret):
            text = text.replace(spelling, HIDDEN)
    text = _TOKEN_AS_USER.sub(rf"\1{HIDDEN}@", text)
    for password in _PASSWORDS:
        text = password.sub(rf"\1:{HIDDEN}@", text)
    text = _TOKEN_FOR_USER.sub(rf"\1{HIDDEN}@", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _CONNECTION.sub(rf"\1{HIDDEN}", _SECRET_QUERY.sub(rf"\1{HIDDEN}", text)))


def without_secrets(config: Any, key: str = "") -> Any:
    """A plain container (dicts, lists, scalars) with the values of secret-sounding keys and all that `redact` hides replaced.

    Of a mapping under such a key every value is hidden.
    """
    if isinstance(config, dict):
        inherited = is_secret(key, config)
        return {name: without_secrets(value, key if inherited else str(name)) for name, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value, key) for value in config]
    if is_secret(key, config):
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
        by_name = bool(value) and is_secret(name.lstrip("+"), value)
        if argument.startswith("-") or value.startswith("${") or not (by_name or value != redact(value) or _holds_secrets(value)):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise SystemExit(f"{program}: {redact(argument)} cannot be read: put its value in quotes ('{name}=\"...\"')") from error
        if override.is_sweep_override():
            raise SystemExit(f"{program}: {name} holds a secret, and a sweep over it would write it down; give it one value")
        variable = f"GRACE_{'SECRET' if by_name else 'SETTING'}_{place}"
        if isinstance(override.value(), dict | list):
            environ[variable], argv[place] = value, f"{name}=${{oc.decode:${{oc.env:{variable}}}}}"
        else:
            environ[variable], argv[place] = str(override.value()), f"{name}=${{oc.env:{variable}}}"


def _holds_secrets(value: str) -> bool:
    """Whether a mapping on the command line has a secret-sounding key."""
    return value.lstrip().startswith(("{", "[")) and any(is_secret(key, "text") for key in re.findall(r"([\w.-]+)['\"]?\s*:", value))


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
        if config.hydra.mode == RunMode.MULTIRUN:  # multirun.yaml, which would keep them until the sweep ends
            _redact_files(Path(config.hydra.sweep.dir))


def _redact_files(folder: Path) -> None:
    for file in folder.glob("*.yaml"):
        saved = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        clean = without_secrets(saved)
        if clean != saved:
            aside = file.with_name(f".{file.name}.{os.getpid()}.partial")  # jobs may be at it side by side
            aside.write_text(OmegaConf.to_yaml(OmegaConf.create(clean)), encoding="utf-8")
            aside.replace(file)
