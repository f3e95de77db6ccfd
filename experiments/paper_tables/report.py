"""Evaluations in MLflow -> the paper's two tables with its numbers beside ours: tables.md, tables.csv, tables.png, and an MLflow run.

python -m experiments.paper_tables.report [models.yaml] [--benchmark mteb_eng_v1] [--output experiments/paper_tables/results]
"""

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from experiments.paper_tables.publishing import publish
from experiments.paper_tables.tables import AVERAGE, NOT_MEASURED, Row, as_csv, figure, markdown
from src.utils.mlflow_store import default_store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SOURCES: dict[str, dict[str, tuple[str, bool]]] = {
    "supervised": {"Base": ("base", False), "+ reasoning": ("base", True), "+ CL": ("cl", False), "GRACE": ("grace_sup", True)},
    "unsupervised": {"Base": ("base", False), "+ reasoning": ("base", True), "+ SimCSE": ("simcse", False), "GRACE": ("grace_unsup", True)},
}
"""Table -> row -> (key of the backbone in the file of models, whether it writes rationales)."""

KEYS = sorted({key for rows in SOURCES.values() for key, _ in rows.values()})


def read_models(file: Path) -> dict[str, dict[str, str]]:
    """Backbone -> key -> what `evaluate.py model=` was given. A pattern is the newest of the paths that it fits, or nothing yet.

    Raises:
        ValueError: the file is no mapping of this form.
    """
    named = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(named, dict) or not all(isinstance(keys, dict) for keys in named.values()):
        raise ValueError(f"{file}: it is a mapping of backbones to {', '.join(KEYS)}")
    models: dict[str, dict[str, str]] = {}
    for backbone, keys in named.items():
        if unknown := sorted(set(keys) - set(KEYS)):
            raise ValueError(f"{file}, {backbone}: {', '.join(unknown)} is none of {', '.join(KEYS)}")
        found = {key: _newest(str(path)) for key, path in keys.items() if path is not None}
        models[backbone] = {key: path for key, path in found.items() if path is not None}
    return models


def _newest(path: str) -> str | None:
    if "*" not in path:
        return path
    return max(map(str, ROOT.glob(path)), key=lambda match: (Path(match).stat().st_mtime, match), default=None)


def place(path: str) -> str:
    """A path as it is compared: a folder of this machine by where it is, anything else (a hub name) as it is."""
    local = ROOT / path
    return str(local.resolve()) if local.exists() else path


def evaluations(client: MlflowClient, project: str, benchmark: str) -> dict[tuple[str, bool], Run]:
    """The newest evaluation on a benchmark by (model, with rationales)."""
    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        return {}
    runs: list[Run] = []
    token: str | None = None
    while token is None or token:
        page = client.search_runs([experiment.experiment_id], f"params.benchmark = '{benchmark}'", page_token=token)
        runs += [run for run in page if f"eval/{AVERAGE}" in run.data.metrics]
        token = page.token or ""
    runs.sort(key=lambda run: run.info.start_time)
    return {(place(run.data.params["model"]), run.data.params["rationale"] in ("both", "True")): run for run in runs}


def measured(client: MlflowClient, run: Run) -> tuple[dict[str, float], str]:
    """Per cent by category and on average, and the note that goes with them."""
    scores: dict[str, Any] = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/scores.json")
    numbers = {name: 100 * score for name, score in {**scores["categories"], AVERAGE: scores["average"]}.items()}
    said = [f"{run.data.params['model']}, MLflow run {run.info.run_id}"]
    if missing := len(scores["failures"]):
        said.append(f"**{missing} of {missing + len(scores['tasks'])} tasks have no score**, so its means compare with no other")
    return numbers, "; ".join(said)


def rows_of(
    models: Mapping[str, Mapping[str, str]], published: Mapping[str, Any], found: Mapping[tuple[str, bool], Run], client: MlflowClient
) -> Iterator[Row]:
    """Every row of both tables, measured or not, for the backbones that the file of models names."""
    for table, rows in SOURCES.items():
        for backbone, keys in models.items():
            for name, (key, rationale) in rows.items():
                run = found.get((place(keys[key]), rationale)) if key in keys else None
                numbers, note = measured(client, run) if run else (None, "")
                yield Row(table, backbone, name, numbers, published.get(table, {}).get(backbone, {}).get(name, {}), note)


def histograms(models: Mapping[str, Mapping[str, str]], output: Path) -> dict[str, Path]:
    """similarities.png of the training runs behind the trained rows, copied beside the tables; by backbone and row."""
    found = {}
    for backbone, keys in models.items():
        for key in ("grace_sup", "grace_unsup"):
            drawn = Path(place(keys[key])).parent / "similarities.png" if key in keys else None
            if drawn is not None and drawn.exists():
                name = re.sub(r"[^\w.-]+", "-", f"similarities_{backbone}_{key}")
                found[f"{backbone}, {key}"] = Path(shutil.copy(drawn, output / f"{name}.png"))
    return found


def write(rows: list[Row], models: Mapping[str, Mapping[str, str]], benchmark: str, output: Path) -> list[Path]:
    """The files."""
    output.mkdir(parents=True, exist_ok=True)
    figure(rows).savefig(output / "tables.png")
    (output / "tables.csv").write_text(as_csv(rows), encoding="utf-8")
    page = [f"# The paper's tables: {benchmark}", ""]
    page += [f"Main scores in %. Behind ours, in brackets, the paper's; {NOT_MEASURED} was not measured here.", "", markdown(rows)]
    page += ["![averages](tables.png)"]
    pictures = histograms(models, output)
    for what, file in pictures.items():
        page += ["", f"Similarities of queries to documents before and after training, {what}:", "", f"![similarities]({file.name})"]
    (output / "tables.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    return [output / "tables.md", output / "tables.csv", output / "tables.png", *pictures.values()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="?", type=Path, default=HERE / "models.yaml", help="which model is which row")
    parser.add_argument("--benchmark", default="mteb_eng_v1", help="as evaluate.py was given it")
    parser.add_argument("--project", default="grace")
    parser.add_argument("--tracking-uri", default=default_store())
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "paper_tables")
    a = parser.parse_args(arguments)
    mlflow.set_tracking_uri(a.tracking_uri)
    client = MlflowClient()
    try:
        models = read_models(a.models)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"paper_tables: {error}") from error
    published = yaml.safe_load((HERE / "published.yaml").read_text(encoding="utf-8"))
    rows = list(rows_of(models, published, evaluations(client, a.project, a.benchmark), client))
    if not any(row.ours for row in rows):
        raise SystemExit(
            f"paper_tables: no evaluation on {a.benchmark} of a model in {a.models} is in project {a.project!r} of {a.tracking_uri}; "
            "README.md has the commands that make them"
        )
    files = write(rows, models, a.benchmark, a.output)
    publish(files, client, a.project, f"paper tables: {a.benchmark}")


if __name__ == "__main__":
    main()
