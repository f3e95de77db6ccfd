"""A whole training step of GRACE here against TRL's GRPOTrainer doing the same work, each in processes of its own.

python -m venv .venv-trl && .venv-trl/bin/pip install -r experiments/speed/trl-requirements.txt
python -m experiments.speed.step [--repeats 5] [--output experiments/speed/step.md]
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.speed.children import child
from experiments.speed.grace_steps import Spec
from experiments.speed.measuring import MIB, machine, paired_ratio, report, table
from experiments.speed.subject import POLICY, ROOT, triplets, unending_policy
from src.modules.encoder.settings import EncoderSettings

OURS, TRL = "GRACE here", "TRL GRPOTrainer"


def specs(a: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The two commands, their settings written to files: the same policy, prompts, K, lengths and micro-batch."""
    policy, renderer = unending_policy(a.policy)
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    encoder = EncoderSettings.load(a.policy)
    encoder.save(folder / "policy")
    records = triplets(renderer, (a.steps + 1) * a.instances, a.packages)
    ours = Spec(
        policy=str(folder / "policy"),
        instances=a.instances,
        rollouts=a.rollouts,
        new_tokens=a.new_tokens,
        micro_batch_tokens=a.instances_per_micro_batch * (encoder.max_prompt_tokens + a.rollouts * a.new_tokens),
        steps=a.steps,
        packages=tuple(a.packages),
    )
    theirs: dict[str, Any] = {
        "policy": ours.policy,
        "instruction": encoder.instruction,
        "max_prompt_tokens": encoder.max_prompt_tokens,
        "instances": a.instances,
        "instances_per_micro_batch": a.instances_per_micro_batch,
        "rollouts": a.rollouts,
        "new_tokens": a.new_tokens,
        "encode_batch_size": 64,
        "steps": a.steps,
        "records": [{"document": r.positive, "query": r.query, "negative": r.negatives[0]} for r in records],
    }
    (folder / "trl.json").write_text(json.dumps(theirs))
    return {
        OURS: [sys.executable, "-m", "experiments.speed.grace_steps", str(ours.save(folder / "grace.json"))],
        TRL: [str(a.trl_python), "-m", "experiments.speed.trl_steps", str(folder / "trl.json")],
    }


def measure(commands: dict[str, list[str]], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step and MiB at the peak, of every command in every round; every second round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name in list(commands)[:: -1 if repeat % 2 else 1]:
            result = child(commands[name])
            seconds[name].append(statistics.median(result["seconds"]))
            memory[name].append(result["bytes"] / MIB)
    return seconds, memory


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(POLICY))
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--instances", type=int, default=32, help="B")
    parser.add_argument("--rollouts", type=int, default=8, help="K")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--instances-per-micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1, help="measured in a process, after one to warm up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packages", nargs="+", default=["sklearn", "sqlalchemy"], help="whose docstrings")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    if not a.trl_python.exists():
        parser.error(
            f"no TRL at {a.trl_python}: python -m venv .venv-trl && .venv-trl/bin/pip install -r experiments/speed/trl-requirements.txt"
        )
    with tempfile.TemporaryDirectory() as folder:
        seconds, memory = measure(specs(a, Path(folder)), a.repeats)
    rows = [
        [
            name,
            f"{statistics.median(seconds[name]):.2f}",
            f"{paired_ratio(seconds[name], seconds[OURS]):.2f}",
            f"{statistics.median(memory[name]):.0f}",
            f"{paired_ratio(memory[name], memory[OURS]):.2f}",
        ]
        for name in seconds
    ]
    head = ["step of", "seconds", f"/ {OURS}", "peak above the model, MiB", f"/ {OURS}"]
    setting = f"B = {a.instances}, K = {a.rollouts}, {a.new_tokens} new tokens, {a.instances_per_micro_batch} instances a micro-batch"
    report(f"{machine()}, {a.repeats} rounds, {setting}\n\n" + table(head, rows), a.output)


if __name__ == "__main__":
    main()
