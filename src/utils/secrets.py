"""Passwords, tokens and keys stay in memory: none reaches a log, a saved config or the tracking store."""

import json
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.utils.atomic import write_atomic

HIDDEN = "***"

# ---- names of settings and environment variables that hold secrets

_SURE = r"(?:\w*passwords?|passwd|passphrase|secrets?|token|jwt|(?:api|access|private)_?keys?|credentials?|connection_?strings?)"
_SERVICES = r"(?:openai|anthropic|azure|storage|account|aws|gcp|google|hf|wandb|databricks|signing|encryption|master)"
_KEYS = re.compile(rf"(^|[._-])({_SURE}|{_SERVICES}[._-]?key)$|(^|[._-])(secret_|aws_)\w*key\w*$", re.IGNORECASE)
_KEYS_OF_TEXT = re.compile(r"(^|[._-])(pass|pwd)$|(^|\.|(^|[._-])(api|auth|access|bearer|refresh|hf)_)tokens$", re.IGNORECASE)
"""Only if the value is text: forward_pass=true and tokens=4096 are no secrets."""
_SPECIAL_TOKENS = re.compile(r"(^|[._-])(pad|bos|eos|unk|cls|sep|mask|stop|start|end|special|image)_token$", re.IGNORECASE)
_VARIABLES = re.compile(rf"(^|_)({_SURE}|tokens|pwd|pass)(_|$)|(^|_)(secret_|aws_)\w*key", re.IGNORECASE)
_ANY_KEY = re.compile(r"_key$", re.IGNORECASE)

# ---- secrets in text. A colon followed by digits is a port, not a password.

_NO_PORT = r"(?!\d{1,5}(?!\w))"
_TOKEN_PREFIX = r"(?:gh[a-z]_|github_pat_|glpat-|hf_|sk-|xox|npm_|pypi-|dapi)"
_QUERY_NAMES = r"(?:[\w-]*(?:password|passwd|secret|token|api_?key|access_?key|private_?key|credentials?)|sig|signature)"
_REPLACED = [
    # a token in place of the user, with or without a password
    (rf"(://)(?:[^/@\s:'\"]+:@|{_TOKEN_PREFIX}[^/@\s:'\"]*(?::[^/@\s'\"]*)?@|[^/@\s:'\"]+:x-oauth-basic@)", rf"\1{HIDDEN}@"),
    # a password: plain; with a slash or quote, up to the first @; with a space
    (r"(://[^/@\s:'\"]*):[^/\s'\"]+@", rf"\1:{HIDDEN}@"),
    (rf"(://[^/@\s:'\"]+):{_NO_PORT}[^\s@]+@", rf"\1:{HIDDEN}@"),
    (rf"(://[^/@\s:'\"]+):{_NO_PORT}(?!\s)[^@\n]{{1,100}}@", rf"\1:{HIDDEN}@"),
    # a user without a password
    (r"(://)(?!\*\*\*@)[^/@\s:'\"]+@", rf"\1{HIDDEN}@"),
    # URI queries, connection strings, HTTP headers
    (rf"(?i)([?&](?:{_QUERY_NAMES}|x-amz-signature|x-amz-security-token)=)[^&\s'\"]*", rf"\1{HIDDEN}"),
    (r"(?i)((?:AccountKey|SharedAccessKey|SharedAccessSignature|;\s*(?:password|pwd))=)[^;\s'\"]+", rf"\1{HIDDEN}"),
    (r"(?i)(Authorization['\"]?\s*[:=]\s*['\"]?(?:Bearer|Basic)\s+)[^\s'\"]+", rf"\1{HIDDEN}"),
]
_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in _REPLACED]


def is_secret(name: str, value: object) -> bool:
    """Returns whether a setting of this (dotted) name holds a secret; null is none."""
    if value is None or _SPECIAL_TOKENS.search(name):
        return False
    return bool(_KEYS.search(name)) or (isinstance(value, str) and not value.isdigit() and bool(_KEYS_OF_TEXT.search(name)))


def redact(text: str) -> str:
    """Returns a text with `***` in place of secrets, e.g. `http://me:***@host` and `https://***@host`.

    Replaces credentials of URIs, secret query parameters, keys of connection strings, Authorization headers, and the values of
    environment variables with names of secrets (HF_TOKEN, PGPASSWORD), in plain text or quoted.
    """
    for secret in _environment_secrets():
        for spelling in _spellings(secret):
            text = text.replace(spelling, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _environment_secrets() -> list[str]:
    """Returns values of environment variables with names of secrets, longest first; no paths, numbers or short values.

    A variable with any other name that ends in `_key` counts unless its value is a plain word.
    """
    found = {value for name, value in os.environ.items() if _VARIABLES.search(name) or (_ANY_KEY.search(name) and not value.isalpha())}
    secrets = (value for value in found if len(value) >= 6 and not value.startswith(("/", "~")) and not value.isdigit())
    return sorted(secrets, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _spellings(secret: str) -> tuple[str, ...]:
    """Returns a secret as written in plain text, JSON, Python, YAML and URIs; longest first."""
    found = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    found |= {secret.replace("'", "''"), quote(secret, safe=""), quote(secret)}
    return tuple(sorted(found, key=len, reverse=True))


def without_secrets(config: Any, key: str = "") -> Any:
    """Returns a plain container (dicts, lists, scalars) with secrets replaced: all values under keys that name one, and by `redact`."""
    if isinstance(config, dict):
        inherited = is_secret(key, config)
        return {name: without_secrets(value, key if inherited else str(name)) for name, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value, key) for value in config]
    if is_secret(key, config):
        return HIDDEN
    return redact(config) if isinstance(config, str) else config


# ---- where secrets would be written


def keep_secrets(argv: list[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Hides secrets of the command line and of what is printed; to be called before Hydra starts.

    A setting with a secret (`paths.tracking_uri=http://me:pw@host`) moves to an environment variable, which child processes
    inherit, and an interpolation replaces it in `argv`: saved configs, Hydra's errors and a sweep's job list show that only.

    Raises:
        SystemExit: a sweep over a secret, or an override that Hydra cannot parse.
    """
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    program, parser = Path(argv[0]).name, OverridesParser.create()
    for place, argument in enumerate(argv[1:], start=1):
        name, _, value = argument.partition("=")
        by_name = bool(value) and is_secret(name.lstrip("+"), value)
        if argument.startswith("-") or value.startswith("${") or not (by_name or value != redact(value) or _holds_secret_keys(value)):
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


def _holds_secret_keys(value: str) -> bool:
    return value.lstrip().startswith(("{", "[")) and any(is_secret(key, "text") for key in re.findall(r"([\w.-]+)['\"]?\s*:", value))


class RedactedStream:
    """A text stream that redacts what is written to it."""

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
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class RedactSavedConfigs(Callback):
    """Redacts the copies of YAML configs that Hydra saves, before the job starts."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.output_subdir is not None:
            _redact_files(Path(config.hydra.runtime.output_dir, config.hydra.output_subdir))
        if config.hydra.mode == RunMode.MULTIRUN:  # multirun.yaml, now and not at the end of the sweep
            _redact_files(Path(config.hydra.sweep.dir))


def _redact_files(folder: Path) -> None:
    for file in folder.glob("*.yaml"):
        saved = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        clean = without_secrets(saved)
        if clean != saved:
            write_atomic(file, OmegaConf.to_yaml(OmegaConf.create(clean)))  # parallel jobs may redact the same file
