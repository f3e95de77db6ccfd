"""Data files for tests, and what is read of them."""

import json
from pathlib import Path

import numpy as np

from src.datamodules.files import DataFile
from src.datamodules.preparation import scan
from src.datamodules.prepared import PreparedTriplets
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import Reader
from src.datamodules.rows import BadRecord
from src.records import Triplet
from tests.builders import small_tokenizer


def limit(max_prompt_tokens: int = 44, instruction: str = "Name the terms.") -> PromptLimit:
    return PromptLimit(small_tokenizer(), instruction, max_prompt_tokens)


def write(path: Path, *lines: object) -> Path:
    """Writes lines: bytes as they are, other values as JSON."""
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def write_triplets(path: Path, count: int, *more: bytes) -> Path:
    """Writes triplets, each with one negative, and more lines."""
    rows = [{"query": f"query {i}", "positive": f"a document about {i}", "negative": f"another {i}"} for i in range(count)]
    return write(path, *rows, *more)


def read(reader: Reader, path: Path) -> list[Triplet | BadRecord]:
    return [record for chunk in scan(DataFile(path, path.name))[1] for record in reader.read(chunk)]


def all_triplets(folder: Path) -> list[Triplet]:
    """Returns the triplets of a prepared folder."""
    prepared = PreparedTriplets(folder)
    return prepared.triplets(np.arange(len(prepared)))
