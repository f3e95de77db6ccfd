"""Step time and peak memory as K, B, the rationales' length and the vocabulary are doubled, each by itself.

    python -m experiments.speed.scaling [--repeats 5] [--output experiments/speed/scaling.md]

Every point is two processes of its own, for time and for memory. Also draws the table, as a PNG beside it.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.speed.children import NOTHING_KEPT, child
from experiments.speed.grace_steps import Spec
from experiments.speed.measuring import MIB, machine, report, table
from experiments.speed.subject import POLICY

WAYS = {"rollouts": "K", "instances": "B", "new_tokens": "rationale length", "vocab_size": "vocabulary"}
Point = tuple[int, float, float]
"""Size, median seconds of a step, MiB at the peak above the loaded model."""


def measure(spec: Spec) -> tuple[float, float]:
    """Median seconds of a step, and MiB at the peak of two more: each from a process of its own, the second without an
    allocator that keeps what was freed (its doing would differ by more than sizes do)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.speed.grace_steps"]
        timed = child([*command, str(spec.save(Path(folder, "timed.json")))])
        weighed = child([*command, str(replace(spec, steps=1).save(Path(folder, "weighed.json")))], NOTHING_KEPT)
    return statistics.median(timed["seconds"]), weighed["bytes"] / MIB


def grow(base: Spec, doublings: int, ways: Sequence[str] = tuple(WAYS)) -> dict[str, list[Point]]:
    """The points of each of some ways to grow (keys of WAYS); the first of each is the base."""
    start = measure(base)
    points: dict[str, list[Point]] = {}
    for way in ways:
        smallest: int = getattr(base, way)
        points[way] = [(smallest, *start)]
        for doubling in range(1, doublings + 1):
            size = smallest * 2**doubling
            points[way].append((size, *measure(replace(base, **{way: size}))))  # type: ignore[arg-type]
    return points


def draw(points: dict[str, list[Point]], file: Path) -> None:
    """Seconds and MiB over size, both axes logarithmic; a grey line shows what linear growth would be."""
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(
        2, len(points), squeeze=False, figsize=(3 * len(points), 5.6), dpi=120, layout="constrained", sharex="col", sharey="row"
    )
    for column, (way, own) in enumerate(points.items()):
        sizes = [size for size, _, _ in own]
        for row, name in ((0, "seconds a step"), (1, "peak above the model, MiB")):
            values = [point[row + 1] for point in own]
            axis = axes[row, column]
            axis.plot(sizes, [values[0] * size / sizes[0] for size in sizes], color="0.8", linewidth=1, label="linear")
            axis.plot(sizes, values, marker="o", markersize=4, label="measured")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(name)
        axes[1, column].set_xlabel(WAYS[way])
    axes[0, 0].legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(POLICY))
    parser.add_argument("--rollouts", type=int, default=4, help="K of the smallest")
    parser.add_argument("--instances", type=int, default=8, help="B of the smallest")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the smallest")
    parser.add_argument("--vocab-size", type=int, default=4096, help="vocabulary of the smallest")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="the same everywhere")
    parser.add_argument("--sampled-tokens", type=int, default=10240, help="held while rationales are written; the same everywhere")
    parser.add_argument("--grow", nargs="+", choices=list(WAYS), default=list(WAYS), help="what is doubled")
    parser.add_argument("--doublings", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of a point")
    parser.add_argument("--packages", nargs="+", default=["sklearn", "sqlalchemy"], help="whose docstrings")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    base = Spec(
        policy=a.policy,
        instances=a.instances,
        rollouts=a.rollouts,
        new_tokens=a.new_tokens,
        micro_batch_tokens=a.micro_batch_tokens,
        sampled_tokens=a.sampled_tokens,
        steps=a.repeats,
        train_embeddings=False,  # their gradient and Adam's moments grow with the vocabulary whatever else does not
        vocab_size=a.vocab_size,
        packages=tuple(a.packages),
    )
    points = grow(base, a.doublings, a.grow)
    rows = []
    for way, own in points.items():
        for before, (size, seconds, memory) in zip([None, *own], own, strict=False):
            factors = ["", ""] if before is None else [f"{seconds / before[1]:.2f}", f"{memory / before[2]:.2f}"]
            rows.append([WAYS[way], size, f"{seconds:.2f}", factors[0], f"{memory:.0f}", factors[1]])
    fixed = f"{a.micro_batch_tokens} tokens a micro-batch, {a.sampled_tokens} held while rationales are written"
    setting = f"{fixed}; otherwise B = {a.instances}, K = {a.rollouts}, {a.new_tokens} new tokens, vocabulary {a.vocab_size}"
    head = ["grows", "to", "seconds a step", "/ half the size", "peak above the model, MiB", "/ half the size"]
    report(f"{machine()}, {a.repeats} steps a point; {setting}\n\n" + table(head, rows), a.output)
    if a.output is not None:
        draw(points, a.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
