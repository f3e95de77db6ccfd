"""Publishes an export on the hub: `python -m src.modules.encoder.push EXPORT OWNER/NAME`. A folder with secrets in it is refused."""

import argparse
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from src.modules.encoder.settings import SETTINGS_FILE
from src.utils.plain_errors import HUB_ERRORS, reason
from src.utils.secrets import HIDDEN, is_secret, redact

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".model", ".npy")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tekken.json")
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
_SPECIAL_TOKEN = re.compile(r"(?<!auth)(?<!access)(?<!api)(?<!hf)_token$", re.IGNORECASE)
"""A key of the tokenizer's files: boi_token and the like, of which each model has its own."""
_LINES = (".yaml", ".yml", ".sh", ".env", ".toml", ".ini", ".cfg", ".conf")
_LINE = re.compile(r"^[ \t]*(?:-[ \t]+|export[ \t]+)?['\"]?([\w.-]+)['\"]?[ \t]*[:=][ \t]*['\"]?([^\s'\"#$<{\[][^\s'\"]*)", re.MULTILINE)
"""`key: value` or `KEY=value`; a value in ${...} or <...> stands for another."""
_NO_VALUES = {HIDDEN, "null", "~", "none", "true", "false"}
_SECRET_FILES = re.compile(r"(^|/)(\.env.*|\.netrc|\.git-credentials|id_(rsa|ed25519|ecdsa).*|[^/]*\.(pem|key|p12|pfx))$", re.IGNORECASE)
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[a-z]-[A-Za-z0-9-]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def secrets_in(folder: Path) -> list[str]:
    """Returns a line for each file of a folder that is a key, or whose text or JSON settings hold a secret; weights are not read."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [f"{file.relative_to(folder)}: {why}" for file in files if (why := _secret_in(file, file.relative_to(folder).as_posix()))]


def _secret_in(file: Path, name: str) -> str:
    """Returns what the secret is; "" if there is none."""
    if _SECRET_FILES.search(name):
        return "a file of keys"
    if file.suffix in _WEIGHTS:
        return ""
    text = file.read_bytes().decode("utf-8", "replace")
    known = file.name in _VOCABULARIES
    named = None if known else next((key for key, value in _named_values(text, file) if is_secret(key, value)), None)
    if named:
        return f"the setting {named}"
    return "a token, a key or a password in its text" if _TOKENS.search(text) or (not known and redact(text) != text) else ""


def _named_values(text: str, file: Path) -> list[tuple[str, Any]]:
    """Returns dotted names and values of a file of settings: JSON, or lines of others; not the special tokens of a tokenizer."""
    if file.suffix.lower() in _LINES:
        return [(key, value) for key, value in _LINE.findall(text) if value.lower() not in _NO_VALUES]
    try:
        found = list(_settings(json.loads(text))) if file.suffix.lower() == ".json" else []
    except ValueError:
        found = []
    return [(key, value) for key, value in found if file.name not in _TOKENIZER or not _SPECIAL_TOKEN.search(key)]


def _settings(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values of what nested JSON holds; a value that is itself an object counts as what it holds."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, dict | list):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Uploads an export to a model repository, which is made if there is none, and returns its address.

    Raises:
        ValueError: the folder is no export, or has secrets in it.
        HUB_ERRORS: the hub is out of reach or refuses.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} is no export: it has no {SETTINGS_FILE}")
    if found := secrets_in(folder):
        raise ValueError(f"{folder} has secrets in it, and nothing was uploaded: " + "; ".join(found))
    api = HfApi()
    address = str(api.create_repo(repository, private=private, exist_ok=True))
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export")
    return address


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and pushes."""
    parser = argparse.ArgumentParser("push", description="Publishes an export on the hub; log in first: hf auth login.")
    parser.add_argument("export", type=Path, help="the folder, outputs/<run>/<time>/export")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--public", action="store_true", help="of a new repository; without it a new one is private")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    refused: tuple[type[Exception], ...] = (ValueError, *HUB_ERRORS)
    try:
        address = push(options.export, options.repository, private=not options.public)
    except refused as error:
        raise SystemExit(f"push: {redact(reason(error))}") from error
    log.info("published at %s", address)


if __name__ == "__main__":
    main()
