"""Scores exported policies with rationales sampled as in training, at temperature 1; writes sampled.md beside this file.

python -m experiments.tiny_learning.sampled <form>=<export folder> [<form>=<export folder> ...] [--draws 2]
"""

import argparse
from pathlib import Path
from statistics import fmean

import yaml

from experiments.tiny_learning.report import SCORES, mean_and_spread, table
from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.offline_tasks import offline_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.rollouts.hf import HFEngine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def scores(folder: Path, tasks: list, draws: int) -> dict[str, float]:
    """Means over draws of rationales."""
    policy, settings = load_policy(folder)
    found: list[dict[str, float]] = []
    for seed in range(draws):
        encoder = RationaleEncoder(policy, settings, HFEngine(settings.max_new_tokens), temperature=1.0, seed=seed)
        result = run_tasks(encoder, tasks, None, f"sampled-{seed}")
        found.append(result.tasks | {"average": result.average})
    return {task: fmean(draw[task] for draw in found) for task in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policies", nargs="+", help="form=folder; forms that come again are further seeds")
    parser.add_argument("--draws", type=int, default=2, help="of rationales, for each policy")
    parser.add_argument("--output", type=Path, default=HERE / "sampled.md")
    arguments = parser.parse_args()
    packages = yaml.safe_load((ROOT / "configs/packages/docstrings.yaml").read_text())["test"]
    tasks = offline_tasks(packages, ROOT / "data/cache", size="large")
    by_form: dict[str, list[dict[str, float]]] = {}
    for entry in arguments.policies:
        form, folder = entry.split("=", 1)
        by_form.setdefault(form, []).append(scores(Path(folder), tasks, arguments.draws))
        print(form, folder, by_form[form][-1], flush=True)
    rows = [
        [form, str(len(seeds)), *(mean_and_spread([seed[task] for seed in seeds], 100) for task in SCORES)]
        for form, seeds in by_form.items()
    ]
    page = table(["", "seeds", *SCORES.values()], rows)
    arguments.output.write_text(f"Rationales sampled at temperature 1, {arguments.draws} draws a policy, %:\n\n{page}\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
