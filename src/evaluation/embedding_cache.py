"""Embeddings that were computed once, found again by the content of their texts: in memory, or in files that outlive the run.

MTEB has a wrapper of that purpose. It keeps a store a task, so that a text of two tasks is embedded twice, writes when a
whole call is done, and rewrites its index in place, which a kill leaves broken. SQLite's transactions have none of that.
"""

import fcntl
import hashlib
import logging
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

log = logging.getLogger(__name__)

SUFFIX = ".sqlite"
_LOCK_SUFFIX = ".lock"  # of a file beside it: SQLite's own locks end when any other handle of its file is closed
_ROW_BYTES = 64  # of a row beside its vector, index included


class EmbeddingCache:
    """[D] float32 vectors by prompt and text, of one encoder.

    On disk it is one file a fingerprint, `<folder>/<fingerprint>.sqlite`; to clean up is to delete files. A `put` is one
    transaction: a process that is killed loses what it was putting and nothing else. Several processes may share a file.

    Args:
        folder: where the files lie; None keeps the vectors in memory.
        fingerprint: names the encoder, weights and settings: see src/evaluation/fingerprint.py.
        dimension: D.
        max_gib: most that the folder (or the memory) may hold. Files of other encoders that no process is using make room
            first, the one that was used longest ago before the others; where there is none left, further vectors are not kept.

    Raises:
        ValueError: the file is no such cache.
    """

    def __init__(self, folder: Path | str | None, fingerprint: str, dimension: int, max_gib: float = 1.0) -> None:
        self.file = Path(folder, fingerprint + SUFFIX) if folder else None
        self.dimension, self.max_bytes = dimension, int(max_gib * 2**30)
        self._full = False
        self._in_use: IO[bytes] | None = None
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._in_use = _shared_lock(self.file)
        # a minute's patience with another process that is writing
        self._connection = sqlite3.connect(self.file or ":memory:", timeout=60, isolation_level=None)
        try:
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        except sqlite3.DatabaseError as error:
            self.close()
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
        if self._in_use:
            self._in_use.close()

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _has_room(self, needed: int) -> bool:
        others = self._others()
        held = self._bytes() + sum(size for _, size, _ in others)
        for _, size, oldest in others:
            if held + needed <= self.max_bytes:
                break
            if _delete_unused(oldest):
                held -= size
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
        found = []
        for file in self.file.parent.glob(f"*{SUFFIX}"):
            try:
                stat = file.stat()
            except FileNotFoundError:
                continue  # another process has just made room
            if file != self.file:
                found.append((stat.st_mtime, stat.st_size, file))
        return sorted(found)


def _shared_lock(file: Path) -> IO[bytes]:
    """Says that `file` is in use, until what is returned is closed or the process ends, however it ends."""
    path = file.with_name(file.name + _LOCK_SUFFIX)
    while True:
        lock = path.open("ab+")
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_at(lock, path):
            return lock
        lock.close()  # deleted with its cache while this waited


def _delete_unused(file: Path) -> bool:
    """Deletes a cache unless a process is using it; whether it did."""
    path = file.with_name(file.name + _LOCK_SUFFIX)
    with path.open("ab+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _is_at(lock, path):
            return False  # another process deletes it
        for part in (file, file.with_name(f"{file.name}-journal"), path):
            part.unlink(missing_ok=True)
    return True


def _is_at(lock: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _key(prompt: str, text: str) -> bytes:
    """16 bytes that no two pairs of prompt and text share."""
    digest = hashlib.sha256()
    for part in (prompt, text):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()[:16]
