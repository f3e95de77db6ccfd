"""Writes what a sweep came to: sweep.md (a table, mean and spread over seeds), sweep.png (a heat map), and the same into MLflow.

python -m experiments.sweep_report "hparams_search=lambdas reward=paper" --output experiments/lambdas/paper
"""

import argparse
from pathlib import Path

from mlflow.tracking import MlflowClient

from src.utils.sweep_report import find_sweep, read_sweep, write_report

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", help="its run id, or some of its name (its command line); the newest without one")
    parser.add_argument("--metrics", nargs="+", default=[], help="in place of those that the sweep names; the first decides")
    parser.add_argument("--curves", nargs="+", default=[], help="metrics to draw over rollout batches")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep_report"))
    parser.add_argument("--project", default="grace")
    parser.add_argument("--tracking-uri", default=f"sqlite:///{ROOT / 'mlflow.db'}")
    arguments = parser.parse_args()
    client = MlflowClient(arguments.tracking_uri)
    try:
        run_id = find_sweep(client, arguments.project, arguments.sweep)
    except ValueError as error:
        raise SystemExit(f"sweep_report: {error}") from error
    files = write_report(client, read_sweep(client, run_id, arguments.metrics, arguments.curves), arguments.output)
    print(files[0].read_text(encoding="utf-8"))
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
