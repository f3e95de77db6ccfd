"""Times in pairs, peak memory, and tables of both. Needs nothing but torch, so that any environment can import it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

MIB = 2**20


def alternating(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each run in each round. Every second round goes backwards, so that a drift of the machine cancels."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of above / below, each pair from the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def report(text: str, output: Path | None) -> None:
    """Prints a benchmark's result, and writes it to a file if there is one to write to."""
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


def machine() -> str:
    """What the numbers were measured on, in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"


# ---- memory: on a GPU what torch has allocated there, else the process's resident set (Linux)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory is measured on Linux alone")


def reset_peak() -> int:
    """Forgets the peak so far; returns what is in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most memory in use at once since `reset_peak`, in bytes."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _status("VmHWM")
