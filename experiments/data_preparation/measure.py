"""Time and memory of preparing a million texts, and of reading batches of them. Linux only: it asks /proc.

`python -m experiments.data_preparation.measure` makes the texts, measures, and writes results.md.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from src.datamodules.files import DataFile
from src.datamodules.preparation import load_report, prepare
from src.datamodules.prepared import PreparedTriplets, TripletBatches, held_out
from src.datamodules.prompt_limit import PromptLimit
from src.datamodules.reading import Reader, SentenceReader, TripletReader
from src.modules.prompt.renderer import GRACE_INSTRUCTION

WORDS = 50_000
SYLLABLES = ("ka", "ter", "mon", "is", "o", "ral", "en", "ti", "u", "ves", "al", "prin", "co", "dae", "lum", "st")


def kilobytes(file: str, field: str) -> int:
    """One figure of a file of /proc; 0 where its process has just ended."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in family(child))]


class PeakMemory:
    """The most memory that this process and its children held together, pages that they share counted once (PSS), in MiB."""

    def __init__(self, every_seconds: float = 0.25) -> None:
        self.every, self.peak = every_seconds, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            held = sum(kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in family(os.getpid()))
            self.peak = max(self.peak, held / 1024)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def texts(count: int, mean_words: float, rng: np.random.Generator) -> Iterator[str]:
    """Lines of made-up words that are drawn as words of a language are: few of them often, most of them seldom."""
    vocabulary = np.array(["".join(SYLLABLES[d] for d in rng.integers(len(SYLLABLES), size=rng.integers(1, 5))) for _ in range(WORDS)])
    share = 1 / np.arange(1, WORDS + 1)
    cumulative = np.cumsum(share / share.sum())
    for start in range(0, count, 10_000):
        lengths = np.maximum(3, rng.gamma(4.0, mean_words / 4.0, size=min(10_000, count - start))).astype(int)
        words = vocabulary[np.minimum(np.searchsorted(cumulative, rng.random(lengths.sum())), WORDS - 1)]
        for own in np.split(words, np.cumsum(lengths)[:-1]):
            yield " ".join(own).capitalize() + "."


def make(path: Path, kind: str, count: int) -> Reader:
    """Writes the file line by line; returns what reads it."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        if kind == "sentences":
            file.writelines(f"{text}\n" for text in texts(count, 20, rng))
            return SentenceReader()
        sides = zip(texts(count, 8, rng), texts(count, 90, rng), texts(count, 90, rng), strict=True)
        file.writelines(json.dumps({"query": q, "positive": p, "negative": n}) + "\n" for q, p, n in sides)
        return TripletReader()


def measure(kind: str, count: int, tokenizer: str, num_proc: int, folder: Path) -> dict[str, str]:
    """One row of the table."""
    reader = make(folder / "data.txt", kind, count)
    file = DataFile(folder / "data.txt", "data.txt")
    limit = PromptLimit.load(tokenizer, GRACE_INSTRUCTION, 1024)
    with PeakMemory() as memory:
        began = time.perf_counter()
        prepared_folder = prepare([file], reader, limit, folder / "cache", num_proc)
        first = time.perf_counter() - began
    began = time.perf_counter()
    prepare([file], reader, limit, folder / "cache", num_proc)
    second = time.perf_counter() - began
    own = kilobytes("/proc/self/status", "RssAnon:")
    prepared = PreparedTriplets(prepared_folder)
    batches = TripletBatches(prepared, [held_out(len(prepared), 0.01, 0)[0]], 64, seed=0)
    began = time.perf_counter()
    read = sum(1 for _, _ in zip(range(200), batches, strict=False))
    return {
        "records": f"{kind}, {load_report(prepared_folder).kept:,}",
        "file, MB": f"{file.path.stat().st_size / 1e6:,.0f}",
        "processes": str(num_proc),
        "first run, s": f"{first:.1f}",
        "peak memory, MiB": f"{memory.peak:,.0f}",
        "second run, s": f"{second:.1f}",
        "a batch of 64, ms": f"{1000 * (time.perf_counter() - began) / max(read, 1):.1f}",
        "memory of the open data, MiB": f"{(kilobytes('/proc/self/status', 'RssAnon:') - own) / 1024:,.0f}",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["sentences", "triplets"], default="sentences")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--tokenizer", default="experiments/tiny_policy/weights", help="folder of a model")
    parser.add_argument("--folder", help="where the texts are written and prepared, some GB for triplets; default: the system's")
    parser.add_argument("--output", default=str(Path(__file__).with_name("results.md")), help="a row is added to this table")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as folder:
        row = measure(options.kind, options.count, options.tokenizer, options.num_proc, Path(folder))
    output = Path(options.output)
    table = output.read_text(encoding="utf-8") if output.exists() else f"| {' | '.join(row)} |\n|{' --- |' * len(row)}\n"
    output.write_text(f"{table}| {' | '.join(row.values())} |\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
