"""Scores what the arms kept of the language model: bits per byte of held-out docstrings and a choice among four summaries.

python -m experiments.smollm2_learning.abilities outputs/smollm2_learning/both-0/export [more exports] [--count 60]

Prints a line for each export and ability: before, after, the gain with its 95 % interval over questions, and whether it was kept.
"""

import argparse
from pathlib import Path

import torch
from omegaconf import OmegaConf

from src.evaluation.abilities import ability_markdown, compare, run_abilities
from src.modules.policy.model import Policy
from src.modules.policy.packaged import SMOLLM2, cache_dir
from src.utils.machine import has_bfloat16

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+")
    parser.add_argument("--count", type=int, default=60, help="questions of each kind")
    parser.add_argument("--tolerance", type=float, default=0.02, help="a loss that counts as none")
    arguments = parser.parse_args()
    packages = OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")["test"]

    def scores(path: str) -> dict:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):
            return run_abilities(Policy.load(path), "offline", list(packages), cache_dir(), arguments.count)

    before = scores(SMOLLM2)
    for export in arguments.exports:
        after = scores(export)
        changes = {task: compare(score, after[task], arguments.tolerance) for task, score in before.items()}
        print(f"\n{Path(export).parent.name}\n\n{ability_markdown(changes)}", flush=True)


if __name__ == "__main__":
    main()
