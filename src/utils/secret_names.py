"""Which settings and environment variables hold secrets, by their names, and how a secret looks in text."""

import json
import os
import re
from functools import lru_cache
from urllib.parse import quote

_LEAST = 6  # characters: the value of a secret variable that is shorter would be found in any text

_SURE = r"(?:\w*passwords?|passwd|passphrase|secrets?|token|jwt|(?:api|access|private)_?keys?|credentials?|connection_?strings?)"
_SERVICES = r"(?:openai|anthropic|azure|storage|account|aws|gcp|google|hf|wandb|databricks|signing|encryption|master)"
_KEYS = re.compile(rf"(^|[._-])({_SURE}|{_SERVICES}[._-]?key)$|(^|[._-])(secret_|aws_)\w*key\w*$", re.IGNORECASE)
_KEYS_OF_TEXT = re.compile(r"(^|[._-])(pass|pwd)$|(^|\.|(^|[._-])(api|auth|access|bearer|refresh|hf)_)tokens$", re.IGNORECASE)
"""Where the value is a text: such a name may be that of a number or a switch, forward_pass=true or tokens=4096."""
_MARKS = re.compile(r"(^|[._-])(pad|bos|eos|unk|cls|sep|mask|stop|start|end|special|image)_token$", re.IGNORECASE)
"""Of a tokenizer."""

_VARIABLES = re.compile(rf"(^|_)({_SURE}|tokens|pwd|pass)(_|$)|(^|_)(secret_|aws_)\w*key", re.IGNORECASE)
_ANY_KEY = re.compile(r"_key$", re.IGNORECASE)


def is_secret(name: str, value: object) -> bool:
    """Whether a setting of this (dotted) name holds a secret; none that is null does."""
    if value is None or _MARKS.search(name):
        return False
    return bool(_KEYS.search(name)) or (isinstance(value, str) and not _is_number(value) and bool(_KEYS_OF_TEXT.search(name)))


def environment_secrets() -> list[str]:
    """Values of the environment variables that are named like secrets, the longest first; paths, numbers and short ones are none.

    A variable that is called some KEY or other counts where its value is no plain word.
    """
    found = {value for name, value in os.environ.items() if _VARIABLES.search(name) or (_ANY_KEY.search(name) and not value.isalpha())}
    return sorted((value for value in found if _may_be_one(value)), key=len, reverse=True)


@lru_cache(maxsize=1024)
def spellings(secret: str) -> tuple[str, ...]:
    """A secret as it stands in plain text, in JSON, in Python's and YAML's quotes, and in a URI; the longest first."""
    found = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    found |= {secret.replace("'", "''"), quote(secret, safe=""), quote(secret)}
    return tuple(sorted(found, key=len, reverse=True))


def _may_be_one(value: str) -> bool:
    return len(value) >= _LEAST and not value.startswith(("/", "~")) and not _is_number(value)


def _is_number(value: str) -> bool:
    return value.isdigit()
