"""Embeddings that were computed once, found again by the content of their texts: in memory, or in files that outlive the run.

MTEB has a wrapper of that purpose. It keeps a store a task, so that a text of two tasks is embedded twice, writes when a
whole call is done, and rewrites its index in place, which a kill leaves broken. SQLite's transactions have none of that.
"""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

log = logging.getLogger(__name__)

SUFFIX = ".sqlite"
_ROW_BYTES = 64  # of a row beside its vector, index included


class EmbeddingCache:
    """[D] float32 vectors by prompt and text, of one encoder.

    On disk it is one file a fingerprint, `<folder>/<fingerprint>.sqlite`; to clean up is to delete files. A `put` is one
    transaction: a process that is killed loses what it was putting and nothing else. Several processes may share a file.

    Args:
        folder: where the files lie; None keeps the vectors in memory.
        fingerprint: names the encoder, weights and settings: see src/modules/fingerprint.py.
        dimension: D.
        max_gib: most that the folder (or the memory) may hold. Files of other encoders make room first, the one that was
            used longest ago before the others; where there is none left, further vectors are not kept.

    Raises:
        ValueError: the file is no such cache.
    """

    def __init__(self, folder: Path | str | None, fingerprint: str, dimension: int, max_gib: float = 1.0) -> None:
        self.file = Path(folder, fingerprint + SUFFIX) if folder else None
        self.dimension, self.max_bytes = dimension, int(max_gib * 2**30)
        self._full = False
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        # a minute's patience with another process that is writing
        self._connection = sqlite3.connect(self.file or ":memory:", timeout=60, isolation_level=None)
        try:
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{self.file} is no cache of embeddings ({error}): delete it, and it is made anew") from error
        if self.file:
            os.utime(self.file)  # used just now

    def get(self, texts: Sequence[str], prompt: str = "") -> dict[str, np.ndarray]:
        """[D] float32 by text, of those that are known under this prompt."""
        find = "SELECT vector FROM embeddings WHERE key = ?"
        rows = {text: self._connection.execute(find, (_key(prompt, text),)).fetchone() for text in dict.fromkeys(texts)}
        return {text: np.frombuffer(row[0], dtype=np.float32) for text, row in rows.items() if row is not None}

    def put(self, texts: Sequence[str], vectors: np.ndarray, prompt: str = "") -> None:
        """Keeps [N, D] float32 vectors of N texts, all of them or (killed, or full) none."""
        if vectors.dtype != np.float32 or vectors.shape != (len(texts), self.dimension):
            raise ValueError(f"{vectors.dtype} embeddings of shape {vectors.shape} for {len(texts)} texts of dimension {self.dimension}")
        if self._full or not self._has_room(len(texts) * (4 * self.dimension + _ROW_BYTES)):
            return
        rows = [(_key(prompt, text), vector.tobytes()) for text, vector in zip(texts, vectors, strict=True)]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0])

    def close(self) -> None:
        """Ends the use of the file."""
        self._connection.close()

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _has_room(self, needed: int) -> bool:
        others = self._others()
        while (held := self._bytes() + sum(size for _, size, _ in others)) + needed > self.max_bytes and others:
            _, _, oldest = others.pop(0)
            oldest.unlink(missing_ok=True)
            log.info("deleted %s, the embeddings used longest ago, to stay below %.1f GiB", oldest, self.max_bytes / 2**30)
        if held + needed > self.max_bytes:
            self._full = True
            log.warning("the cache of embeddings is full (%.1f GiB): what comes now is not kept", self.max_bytes / 2**30)
        return not self._full

    def _bytes(self) -> int:
        pages, size = (self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        return int(pages * size)

    def _others(self) -> list[tuple[float, int, Path]]:
        """When it was last used, size and path of every other encoder's file, those used longest ago first."""
        if self.file is None:
            return []
        found = [(file, file.stat()) for file in self.file.parent.glob(f"*{SUFFIX}") if file != self.file]
        return sorted((stat.st_mtime, stat.st_size, file) for file, stat in found)


def _key(prompt: str, text: str) -> bytes:
    """16 bytes that no two pairs of prompt and text share."""
    digest = hashlib.sha256()
    for part in (prompt, text):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()[:16]
