import os
import signal
import time

import numpy as np
import pytest

from src.evaluation.embedding_cache import EmbeddingCache

D = 16


def vectors_of(texts: list[str]) -> np.ndarray:
    """[N, D] float32 that depend on the texts (numbers) alone."""
    return np.stack([np.random.default_rng(int(text)).random(D, dtype=np.float32) for text in texts])


@pytest.mark.parametrize("on_disk", [False, True])
def test_vectors_by_prompt_and_text(on_disk, tmp_path):
    texts = [str(i) for i in range(5)]
    folder = tmp_path if on_disk else None
    with EmbeddingCache(folder, "a", D) as cache:
        cache.put(texts, vectors_of(texts), "query")
        found = cache.get(["3", "9", "0", "3"], "query")
        assert list(found) == ["3", "0"]
        np.testing.assert_array_equal(found["3"], vectors_of(["3"])[0])
        assert cache.get(texts, "document") == {}
        assert cache.get(["q" + texts[0]], "uery") == {}  # prompt and text are not run together
    with EmbeddingCache(folder, "a", D) as again, EmbeddingCache(folder, "b", D) as other:
        assert list(again.get(["1"], "query")) == (["1"] if on_disk else [])
        assert other.get(["1"], "query") == {}


WRITER = """
import sys, numpy as np
from pathlib import Path
from src.evaluation.embedding_cache import EmbeddingCache
cache = EmbeddingCache(Path(sys.argv[1]), "a", 4096)
print("ready", flush=True)
for start in range(0, 10**9, 64):
    texts = [str(i) for i in range(start, start + 64)]
    cache.put(texts, np.stack([np.full(4096, int(text), dtype=np.float32) for text in texts]))
"""


def test_kill_leaves_complete_puts(programs, tmp_path):
    writer = programs.start("-c", WRITER, str(tmp_path))
    writer.wait_for("ready")
    time.sleep(0.3)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    with EmbeddingCache(tmp_path, "a", 4096) as cache:
        count = len(cache)
        assert count > 0
        assert count % 64 == 0
        found = cache.get([str(i) for i in range(count)])
        assert len(found) == count
        assert all((vector == int(text)).all() and vector.shape == (4096,) for text, vector in found.items())


def test_least_recently_used_makes_room(tmp_path):
    texts = [str(i) for i in range(2000)]
    gib = 0.5 * 2000 * 4 * D / 2**30 + 400_000 / 2**30  # for two files, not for three
    for age, name in ((300, "old"), (200, "used_again"), (100, "young")):
        with EmbeddingCache(tmp_path, name, D) as cache:
            cache.put(texts[:1000], vectors_of(texts[:1000]))
        os.utime(tmp_path / f"{name}.sqlite", (time.time() - age, time.time() - age))
    EmbeddingCache(tmp_path, "old", D).close()  # used now
    with EmbeddingCache(tmp_path, "new", D, gib) as cache:
        cache.put(texts[:1000], vectors_of(texts[:1000]))
        assert len(cache) == 1000
    left = {file.stem for file in tmp_path.glob("*.sqlite")}
    assert "used_again" not in left
    assert {"old", "new"} <= left
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= gib * 2**30


USER = """
import sys, time, numpy as np
from pathlib import Path
from src.evaluation.embedding_cache import EmbeddingCache
with EmbeddingCache(Path(sys.argv[1]), "used", 16) as cache:
    cache.put(["1"], np.full((1, 16), 1, dtype=np.float32))
    print("ready", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    cache.put(["2"], np.full((1, 16), 2, dtype=np.float32))
    print(len(cache), "vectors")
"""


def test_file_in_use_is_not_deleted(programs, tmp_path):
    texts, folder = [str(i) for i in range(1000)], tmp_path / "cache"
    gib = 100_000 / 2**30  # for less than is put
    with EmbeddingCache(folder, "unused", D) as cache:
        cache.put(["1"], vectors_of(["1"]))
    user = programs.start("-c", USER, str(folder), str(tmp_path / "go on"))
    user.wait_for("ready")
    os.utime(folder / "used.sqlite", (1, 1))  # the one used longest ago
    for left in ({"used", "new"}, {"new"}):
        with EmbeddingCache(folder, "new", D, gib) as cache:
            cache.put(texts, vectors_of(texts))
        assert {file.stem for file in folder.glob("*.sqlite")} == left
        (tmp_path / "go on").touch()
        assert user.wait() == 0
    assert "2 vectors" in user.stdout.read_text()
    assert {file.name for file in folder.iterdir()} == {"new.sqlite", "new.sqlite.lock"}


def test_full_cache_keeps_what_it_has(tmp_path, caplog):
    texts = [str(i) for i in range(3000)]
    with EmbeddingCache(tmp_path, "a", D, max_gib=150_000 / 2**30) as cache:
        cache.put(texts[:500], vectors_of(texts[:500]))
        for _ in range(2):
            cache.put(texts[500:], vectors_of(texts[500:]))
        assert len(cache) == 500
        assert len(cache.get(texts)) == 500
    assert [record.message for record in caplog.records].count("the cache of embeddings is full (0.0 GiB): further ones are not kept") == 1


def test_another_file_is_named(tmp_path):
    (tmp_path / "a.sqlite").write_text("something else " * 100)
    with pytest.raises(ValueError, match=r"a.sqlite is no cache of embeddings .*: delete it") as caught:
        EmbeddingCache(tmp_path, "a", D)
    assert "\n" not in str(caught.value)


def test_another_shape_or_type_is_an_error(tmp_path):
    with EmbeddingCache(None, "a", D) as cache:
        with pytest.raises(ValueError, match=r"shape \(2, 16\) for 1 texts"):
            cache.put(["1"], vectors_of(["1", "2"]))
        with pytest.raises(ValueError, match="float64"):
            cache.put(["1"], vectors_of(["1"]).astype(np.float64))
