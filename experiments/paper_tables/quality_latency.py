"""What rationales of several lengths cost and give: seconds of writing and of encoding a text, beside the score.

python -m experiments.paper_tables.quality_latency --model outputs/tiny_sup/<time>/export --lengths 0 8 16 32 48 96

A length of 0 is no rationale. Writing is what the rollout engine takes, which pools while it writes. Encoding is a pass over
prompt and rationale, which only engines that do not pool need (the paper's does): with `rollout=hf` the first is all there is.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

from experiments.paper_tables.publishing import publish
from experiments.speed.measuring import machine, table
from src.evaluation.run_tasks import run_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts, without_rationales
from src.utils.mlflow_store import default_store

ROOT = Path(__file__).resolve().parents[2]
HEAD = ["longest rationale, tokens", "its mean", "writing, ms a text", "encoding, ms a text", "average, %"]


@dataclass(frozen=True)
class Point:
    """A length: most tokens of a rationale and their mean, milliseconds a text of writing and of encoding it, average score in per cent."""

    length: int
    mean_tokens: float
    writing_ms: float
    encoding_ms: float
    average: float


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@torch.no_grad()
def times(policy: Policy, prompts: Prompts, length: int, batch_size: int, repeats: int) -> tuple[float, float, float]:
    """Mean tokens of a rationale, seconds of writing and of encoding them, for texts of like lengths together."""
    parts = prompts.lengths.argsort(descending=True, stable=True).split(batch_size)
    batches = [prompts.select(part) for part in parts]
    engine = HFEngine(max(1, length))

    def write() -> list[Rollouts]:
        if length == 0:
            return [without_rationales(batch, policy.pad_id).to(policy.device) for batch in batches]
        return [engine.generate(policy, batch, n=1, temperature=0.0) for batch in batches]

    rollouts = write()  # also warms up
    tokens = torch.cat([part.rationale_lengths for part in rollouts]).float().mean().item()
    writing = timed(write, repeats) if length else 0.0
    return tokens, writing, timed(lambda: [policy.embed(part) for part in rollouts], repeats)


def measure(policy: Policy, settings: EncoderSettings, texts: Sequence[str], tasks: list, length: int, a: argparse.Namespace) -> Point:
    """One length: its times on the texts, its score on the tasks. Nothing is read from a cache, nor kept."""
    renderer = PromptRenderer(policy.tokenizer, settings.instruction, settings.max_prompt_tokens, dict(settings.template_kwargs))
    tokens, writing, encoding = times(policy, renderer(list(texts)), length, a.batch_size, a.repeats)
    settings = replace(settings, max_new_tokens=max(1, length))
    encoder = RationaleEncoder(policy, settings, HFEngine(settings.max_new_tokens), rationale=length > 0)
    scores = run_tasks(encoder, tasks, None, f"length-{length}")
    if scores.failures:
        raise SystemExit("quality_latency: " + "; ".join(f"{task}: {reason}" for task, reason in scores.failures.items()))
    return Point(length, tokens, 1000 * writing / len(texts), 1000 * encoding / len(texts), 100 * scores.average)


def figure(points: Sequence[Point]) -> Figure:
    """Score over milliseconds a text: of writing, and of writing and encoding; each point with its length."""
    drawn = Figure(figsize=(7.0, 4.0), dpi=120, layout="constrained")
    axis = drawn.subplots()
    scores = [point.average for point in points]
    # without a rationale, encoding is what there is to do
    own = [point.writing_ms or point.encoding_ms for point in points]
    both = [point.writing_ms + point.encoding_ms for point in points]
    axis.plot(own, scores, "o-", label="pooled while it is written")
    axis.plot(both, scores, "s--", color="C7", label="written, then encoded")
    for point, x in zip(points, own, strict=True):
        axis.annotate(str(point.length), (x, point.average), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axis.set_xlabel("ms a text")
    axis.set_ylabel("average, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return drawn


def write(points: Sequence[Point], said: str, output: Path) -> list[Path]:
    """quality_latency.md, .csv and .png."""
    output.mkdir(parents=True, exist_ok=True)
    page, numbers, drawn = (output / f"quality_latency.{suffix}" for suffix in ("md", "csv", "png"))
    rows = [[str(p.length), f"{p.mean_tokens:.1f}", f"{p.writing_ms:.2f}", f"{p.encoding_ms:.2f}", f"{p.average:.2f}"] for p in points]
    page.write_text(f"{said}\n\n{table(HEAD, rows)}\n![score over latency](quality_latency.png)\n", encoding="utf-8")
    with numbers.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[field.name for field in fields(Point)], *map(astuple, points)])
    figure(points).savefig(drawn)
    return [page, numbers, drawn]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "experiments" / "tiny_policy" / "weights"), help="as for evaluate.py")
    parser.add_argument("--lengths", nargs="+", type=int, default=[0, 8, 16, 32, 48, 96])
    parser.add_argument("--packages", nargs="+", default=["scipy", "pandas", "networkx"], help="whose docstrings are scored and timed")
    parser.add_argument("--size", default="large", help="of their tasks")
    parser.add_argument("--benchmark", help="an MTEB benchmark or task in place of them; times are still those of docstrings")
    parser.add_argument("--texts", type=int, default=256, help="that are timed")
    parser.add_argument("--batch-size", type=int, default=64, help="texts at a time, where times are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--project", default="grace")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "paper_tables")
    a = parser.parse_args(arguments)
    policy, settings = load_policy(a.model)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    from src.datamodules.docstrings import collect
    from src.evaluation.benchmarks import named_tasks
    from src.evaluation.tasks.offline_tasks import offline_tasks

    cache = ROOT / "data" / "cache"
    texts = [document.body for document in collect(a.packages, cache)][: a.texts]
    own = ROOT / "data" / "mteb"
    tasks = named_tasks([a.benchmark], own) if a.benchmark else offline_tasks(a.packages, cache, size=a.size, load=False)
    points = [measure(policy, settings, texts, tasks, length, a) for length in sorted(a.lengths)]
    scored = a.benchmark or f"tasks of {', '.join(a.packages)}"
    said = f"{a.model}, greedy, {scored}; {len(texts)} texts in batches of {a.batch_size}, {machine()}"
    files = write(points, said, a.output)
    publish(files, MlflowClient(a.tracking_uri), a.project, "quality and latency")


if __name__ == "__main__":
    main()
