"""One table of one GPU in at most six minutes: rollouts, update, a whole step and evaluation, each beside another way and its floor.

Models have the shapes of Qwen2.5-1.5B and SmolLM2-135M and random weights, so nothing is downloaded. No rationale ends before its limit.

python -m experiments.speed.gpu [--output experiments/speed/gpu.md]
python -m experiments.speed.gpu --small        # a tiny shape, on a CPU in about a minute
"""

import argparse
import functools
import importlib.util
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from experiments.speed.floor import rates
from experiments.speed.measuring import machine, peak, report, reset_peak, table
from experiments.speed.rollouts import Engine, transformers_generate, vllm
from experiments.speed.subject import ROOT, random_policy, triplets
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import listwise
from src.modules.plan.memory import shape_of
from src.modules.plan.speed import batch_phases, reading, writing
from src.modules.policy.model import Policy, evaluation_mode
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.hf import HFEngine
from src.modules.types import without_rationales
from src.records import Triplet

INSTRUCTION = "Explain in a few words what this text is about."
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Setting:
    """What is measured of a shape.

    Attributes:
        config: of the model.
        prompts: texts that rationales are written for, at most `prompt_tokens` long each.
        new_tokens: of every rationale.
        instances: of a training step with K = 8.
        texts: embedded without rationales.
        micro_batch_tokens: of the update.
    """

    config: PreTrainedConfig
    prompts: int
    prompt_tokens: int
    new_tokens: int
    instances: int
    texts: int
    micro_batch_tokens: int = 16384


QWEN = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMALL = {"vocab_size": 9000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTINGS = {
    "Qwen2.5-1.5B": Setting(Qwen2Config(**QWEN, **TIED, num_key_value_heads=2), 64, 274, 128, 16, 1024),  # type: ignore[arg-type]
    "SmolLM2-135M": Setting(LlamaConfig(**SMOLLM2, **TIED, num_key_value_heads=3), 48, 160, 48, 48, 4096),  # type: ignore[arg-type]
}
SMALL_SETTING = Setting(LlamaConfig(**SMALL, **TIED, num_key_value_heads=2), 4, 96, 6, 2, 16, 1024)  # type: ignore[arg-type]


def seconds_of(run: Callable[[], object], repeats: int = 2) -> float:
    """The fastest of some runs, after what they had waited for on the GPU."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


class Phases(L.Callback):
    """Seconds of every batch by phase, and of the whole of it under `step`."""

    def __init__(self) -> None:
        self.batches: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.batches.append({**module.batch_metrics.seconds, "step": time.perf_counter() - self._start})


class Benchmark:
    """The measurements of one shape; each gives rows of the table."""

    def __init__(self, setting: Setting, packages: Sequence[str]) -> None:
        self.s, self.gpu = setting, torch.cuda.is_available()
        self.policy = random_policy(setting.config).to("cuda" if self.gpu else "cpu").eval()
        self.renderer = PromptRenderer(self.policy.tokenizer, INSTRUCTION, setting.prompt_tokens)
        needed = max(setting.prompts, setting.instances * 2)
        self.records: list[Triplet] = triplets(self.renderer, needed, packages)
        self.prompts = self.renderer([record.positive for record in self.records[: setting.prompts]])
        self.shape = shape_of(setting.config)
        self.card = rates(self.shape, setting.prompts)
        self.precision = functools.partial(torch.autocast, "cuda" if self.gpu else "cpu", torch.bfloat16, enabled=self.gpu)
        self.rows: list[list[str]] = []

    def add(self, what: str, seconds: float, count: float, unit: str, floor: float, other: float | None = None) -> None:
        """A row; `other` is the seconds of the way that it is compared with."""
        ratio = "" if other is None else f"{other / seconds:.1f}"
        self.rows.append([what, f"{seconds:.2f}", f"{count / seconds:,.0f} {unit}", ratio, f"{seconds / floor:.1f}"])

    @functools.cached_property
    def vllm(self) -> Engine:
        """vLLM's engine, one for all calls."""
        return vllm(self.policy, self.s.new_tokens, self.s.prompt_tokens)

    def rollouts(self, k: int) -> None:
        """rollout=hf, transformers' generate with bfloat16 weights, and vLLM where it is installed."""
        n, new, lengths, width = len(self.prompts), self.s.new_tokens, self.prompts.lengths.tolist(), 2 if self.gpu else 4
        floor = sum(
            p.seconds(self.card, self.gpu) for p in (reading(self.shape, lengths, width), writing(self.shape, lengths, k, new, width))
        )

        own = HFEngine(new)  # one for all calls: it may keep graphs

        def ours() -> int:
            with self.precision():
                return len(own.generate(self.policy, self.prompts, k, 1.0))

        engines: dict[str, Callable[[], int]] = {"rollout=hf": ours}
        generate = transformers_generate(self.policy, new)
        if importlib.util.find_spec("vllm") and self.gpu:
            engines["rollout=vllm"] = lambda: self.vllm(self.prompts, k)
        with evaluation_mode(self.policy):
            found = {}
            for name, run in engines.items():
                run()  # captures, compiles
                found[name] = seconds_of(run)
            with resident(self.policy, self.gpu):
                generate(self.prompts.select(torch.arange(2)), k)
                other = seconds_of(lambda: generate(self.prompts, k), 1)
        for name, seconds in found.items():
            self.add(f"{name}, K = {k}, {n} prompts, {new} tokens", seconds, n * k * new, "tokens/s", floor, other)
        self.add(f"transformers generate, K = {k}", other, n * k * new, "tokens/s", floor)

    def training(self) -> None:
        """Steps of GRACE: the first texts twice, and then others."""
        b, k = self.s.instances, 8
        first, later = self.records[:b], self.records[b : 2 * b]
        module = GRACE(
            policy=self.policy,
            engine=HFEngine(self.s.new_tokens),
            reward=functools.partial(listwise, temperature=0.05),
            algorithm=Algorithm(grpo, ppo_clip),
            instruction=INSTRUCTION,
            max_prompt_tokens=self.s.prompt_tokens,
            num_generations=k,
            micro_batch_tokens=self.s.micro_batch_tokens,
        )
        phases, options = Phases(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        precision: Any = "bf16-mixed" if self.gpu else "32-true"
        trainer = L.Trainer(devices=1, max_epochs=1, precision=precision, callbacks=[phases], enable_model_summary=False, **options)  # type: ignore[arg-type]
        trainer.fit(module, DataLoader([first, first, later], batch_size=None))  # type: ignore[arg-type]
        cold, known, new = phases.batches
        for what, records, seconds, other in (
            ("first update", first, cold["update"], None),
            ("update, the same shapes again", first, known["update"], cold["update"]),
            ("update, new shapes", later, new["update"], known["update"]),
            ("a step, new shapes", later, new["step"], known["step"]),
        ):
            lengths = module.renderer([record.positive for record in records]).lengths.tolist()
            others = module.renderer([text for record in records for text in (record.query, *record.negatives)]).lengths.tolist()
            parts = batch_phases(self.shape, lengths, k, others, self.s.new_tokens, self.gpu)
            floor = sum(part.seconds(self.card, self.gpu) for part in (parts if what.startswith("a step") else parts[-1:]))
            tokens = sum(lengths) + len(lengths) * k * self.s.new_tokens
            self.add(f"{what}, B = {b}, K = {k}", seconds, tokens, "tokens/s", floor, other)

    def evaluation(self) -> None:
        """Plain embeddings by RationaleEncoder, and in float32 by batches of 64 texts in their order."""
        texts = [f"{i} {self.records[i % len(self.records)].positive}" for i in range(self.s.texts)]
        encoder = RationaleEncoder(
            self.policy, EncoderSettings(INSTRUCTION, self.s.prompt_tokens), HFEngine(self.s.new_tokens), rationale=False
        )
        encoder.encode(texts[:64])
        seconds = seconds_of(lambda: encoder.encode(texts))
        lengths = encoder.renderers[None](texts).lengths.tolist()

        def in_batches() -> None:
            with evaluation_mode(self.policy):
                for start in range(0, len(texts), 64):
                    rollouts = without_rationales(self.renderer(texts[start : start + 64]), self.policy.pad_id)
                    self.policy.embed(rollouts.to(self.policy.device)).cpu()

        floor = reading(self.shape, lengths, 2 if self.gpu else 4).seconds(self.card, self.gpu)
        self.add(f"embedding {len(texts):,} texts", seconds, len(texts), "texts/s", floor, seconds_of(in_batches, 1))


class resident:  # noqa: N801  # a context manager
    """Holds the weights in bfloat16 while in force, as models are served; float32 comes back exactly."""

    def __init__(self, policy: Policy, active: bool) -> None:
        self.weights = {name: weight.data for name, weight in policy.named_parameters()} if active else {}
        self.policy = policy

    def __enter__(self) -> None:
        for name in self.weights:
            parameter = self.policy.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)

    def __exit__(self, *_: object) -> None:
        for name, data in self.weights.items():
            self.policy.get_parameter(name).data = data


NOTES = """
The other way of rollouts is `generate` with weights in bfloat16 (on a GPU); of embedding, float32 in batches of 64 texts in their order;
of an update, the first of the process, which compiles; of new shapes, those that were seen before (below 1: slower). The floor is all
arithmetic and reading at the card's full rates.
"""


def section(name: str, setting: Setting, packages: Sequence[str]) -> str:
    """The table of one shape."""
    reset_peak()
    began, benchmark = time.monotonic(), Benchmark(setting, packages)
    for k in (1, 8):
        benchmark.rollouts(k)
    benchmark.evaluation()
    benchmark.training()
    mean = benchmark.prompts.lengths.float().mean()
    head = ["what", "seconds", "speed", "times faster than the other way", "times the floor"]
    return (
        f"## {name}: {benchmark.shape.parameters / 1e6:,.0f} M parameters, prompts of {mean:.0f} tokens on average\n\n"
        + table(head, benchmark.rows)
        + f"\nThe floor is that of {benchmark.card.name}. Peak memory {peak() / 2**30:.1f} GiB; "
        + f"measured in {time.monotonic() - began:.0f} s.\n{NOTES}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--small", action="store_true", help="a tiny shape in their place")
    parser.add_argument("--packages", nargs="+", default=["sklearn", "sqlalchemy"], help="whose docstrings")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    if not (a.small or torch.cuda.is_available()):
        parser.error("no GPU here: --small measures a tiny shape on the CPU")
    for name in ("transformers", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if a.small:
        sections = [section("small", SMALL_SETTING, a.packages)]
    elif len(a.shapes) == 1:
        sections = [section(a.shapes[0], SETTINGS[a.shapes[0]], a.packages)]
    else:  # each in a process of its own, whose memory and engine are then gone
        sections = [alone(name, a.packages) for name in a.shapes]
    report((f"{machine()}\n\n" if len(sections) == 1 else "") + "\n".join(sections), a.output)


def alone(name: str, packages: Sequence[str]) -> str:
    """The report of one shape from another process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.md")
        subprocess.run(
            [sys.executable, "-m", "experiments.speed.gpu", "--shapes", name, "--packages", *packages, "--output", str(file)],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return file.read_text()


if __name__ == "__main__":
    main()
