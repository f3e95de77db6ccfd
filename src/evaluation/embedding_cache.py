"""Cache of embeddings by the content of their texts, in memory or in files that outlive the run.

MTEB's own wrapper keeps a store for each task, so that a text of two tasks is embedded twice, and rewrites its index in place, which a
kill corrupts. SQLite's transactions do neither.
"""

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

SUFFIX = ".sqlite"
_IN_USE_SECONDS = 3600.0  # after its last use, a file may still be in use by a process
_ROW_BYTES = 64  # of a row beside its vector, index included


class EmbeddingCache:
    """[D] float32 vectors by prompt and text, of one encoder.

    On disk, one file an encoder, `<folder>/<fingerprint>.sqlite`, which several processes may share and which may be deleted. A `put`
    is one transaction: a process that is killed loses that alone.

    Args:
        folder: of the files; None keeps the vectors in memory.
        fingerprint: key of the encoder; see src/evaluation/fingerprint.py.
        dimension: D.
        max_gib: most that the folder (or the memory) may hold. Files of other encoders that were not used for an hour are deleted
            for new vectors, the least recently used first; if there are none, further vectors are not kept.

    Raises:
        ValueError: the file is no such cache.
    """

    def __init__(self, folder: Path | str | None, fingerprint: str, dimension: int, max_gib: float = 1.0) -> None:
        self.file = Path(folder, fingerprint + SUFFIX) if folder else None
        self.dimension, self.max_bytes = dimension, int(max_gib * 2**30)
        self._full = False
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        # another process that writes is waited for, a minute at most
        self._connection = sqlite3.connect(self.file or ":memory:", timeout=60, isolation_level="IMMEDIATE")
        try:
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{self.file} is no cache of embeddings ({error}): delete it") from error
        self._touch()

    def get(self, texts: Sequence[str], prompt: str = "") -> dict[str, np.ndarray]:
        """Returns the [D] float32 vectors that are cached under this prompt, by text."""
        self._touch()
        find = "SELECT vector FROM embeddings WHERE key = ?"
        rows = {text: self._connection.execute(find, (_key(prompt, text),)).fetchone() for text in dict.fromkeys(texts)}
        return {text: np.frombuffer(row[0], dtype=np.float32) for text, row in rows.items() if row is not None}

    def put(self, texts: Sequence[str], vectors: np.ndarray, prompt: str = "") -> None:
        """Stores [N, D] float32 vectors of N texts, all of them or (killed, or full) none."""
        if vectors.dtype != np.float32 or vectors.shape != (len(texts), self.dimension):
            raise ValueError(f"{vectors.dtype} embeddings of shape {vectors.shape} for {len(texts)} texts of dimension {self.dimension}")
        if not self._full and self._has_room(len(texts) * (4 * self.dimension + _ROW_BYTES)):
            rows = [(_key(prompt, text), vector.tobytes()) for text, vector in zip(texts, vectors, strict=True)]
            with self._connection:
                self._connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _touch(self) -> None:
        """Sets the time of the last use, which is that of the file."""
        if self.file:
            with suppress(FileNotFoundError):  # deleted meanwhile, as it may be
                os.utime(self.file)

    def _has_room(self, needed: int) -> bool:
        others = self._others()
        pages, size = (self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        held = int(pages * size) + sum(size for _, size, _ in others)
        for used, size, file in others:
            if held + needed <= self.max_bytes or time.time() - used < _IN_USE_SECONDS:
                break
            for part in (file, file.with_name(f"{file.name}-journal")):
                part.unlink(missing_ok=True)
            held -= size
            log.info("deleted %s, the least recently used embeddings, to stay below %.1f GiB", file, self.max_bytes / 2**30)
        if held + needed > self.max_bytes:
            self._full = True
            log.warning("the cache of embeddings is full (%.1f GiB): further ones are not kept", self.max_bytes / 2**30)
        return not self._full

    def _others(self) -> list[tuple[float, int, Path]]:
        """Returns the last use, size and path of every other encoder's file, the least recently used first."""
        found = []
        for file in self.file.parent.glob(f"*{SUFFIX}") if self.file else ():
            with suppress(FileNotFoundError):  # another process has just deleted it
                found.append((file.stat().st_mtime, file.stat().st_size, file))
        return sorted(entry for entry in found if entry[2] != self.file)


def _key(prompt: str, text: str) -> bytes:
    """Returns 16 bytes that no two pairs of prompt and text share."""
    digest = hashlib.sha256()
    for part in (prompt, text):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()[:16]
