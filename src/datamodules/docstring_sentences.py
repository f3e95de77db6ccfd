"""The default data as unsupervised text: a file with the body of a docstring on each line."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from src.datamodules.docstrings import collect, cut_between_words


def docstring_sentences(packages: Sequence[str], cache_dir: str, max_text_chars: int = 320) -> str:
    """Path of that file in `cache_dir`, named by its content; written where it does not exist.

    Args:
        packages: whose docstrings.
        max_text_chars: longest line, cut between words.
    """
    lines = "".join(cut_between_words(doc.body, max_text_chars) + "\n" for doc in collect(packages, cache_dir))
    content = lines.encode("utf-8")
    file = Path(cache_dir) / f"docstring_sentences_{hashlib.sha256(content).hexdigest()[:16]}.txt"
    if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}.tmp")  # written aside: two runs may start at once
        partial.write_bytes(content)
        partial.replace(file)
    return str(file)
