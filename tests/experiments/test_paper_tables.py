"""The paper's tables from evaluations that evaluate.py logged, and quality against latency by rationale length."""

import csv
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

import evaluate
from experiments.paper_tables import quality_latency, report
from experiments.paper_tables.tables import AVERAGE, CATEGORIES, Row, as_csv, cell, figure, markdown
from tests.conftest import ROOT
from tests.runs import mlflow_runs

FOLDER = ROOT / "experiments" / "paper_tables"


def rows() -> list[Row]:
    return [
        Row("supervised", "B", "Base", {"STS": 50.0, AVERAGE: 41.234}, {AVERAGE: 40.0}, "run 1"),
        Row("supervised", "B", "GRACE", None, {"STS": 60.5, AVERAGE: 45.48}),
    ]


def test_cells():
    base, grace = rows()
    assert cell(base, AVERAGE) == "41.23 (40.00)"
    assert cell(base, "STS") == "50.00"
    assert cell(grace, AVERAGE) == "n/m (45.48)"
    assert cell(grace, "Retrieval") == "n/m"


def test_tables_are_markdown_and_csv():
    page = markdown(rows())
    assert "| B | Base [1] | n/m | n/m | n/m | n/m | n/m | 50.00 | n/m | 41.23 (40.00) |" in page
    assert page.endswith("1. run 1\n")
    numbers = list(csv.DictReader(as_csv(rows()).splitlines()))
    assert len(numbers) == 2 * (len(CATEGORIES) + 1)
    assert {n["column"]: n["ours"] for n in numbers if n["row"] == "Base"}["STS"] == "50.00"
    assert [n["published"] for n in numbers if n["row"] == "GRACE" and n["ours"]] == []
    assert len(figure(rows()).axes) == 1


def test_published_numbers_are_complete():
    published = yaml.safe_load((FOLDER / "published.yaml").read_text())
    models = yaml.safe_load((FOLDER / "models.yaml").read_text())
    for table, sources in report.SOURCES.items():
        assert published[table].keys() == models.keys()
        for own in published[table].values():
            assert own.keys() <= sources.keys()
            assert all(AVERAGE in numbers for numbers in own.values())
    for numbers in published["supervised"].values():
        assert numbers["GRACE"].keys() == {*CATEGORIES, AVERAGE}


def test_models_are_read_and_checked(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text("B: {base: experiments/tiny_pol*/weights, cl: null}")
    assert report.read_models(file) == {"B": {"base": str(FOLDER.parent / "tiny_policy" / "weights")}}
    file.write_text("B: {base: experiments/none_*/weights}")
    assert report.read_models(file) == {"B": {}}
    file.write_text("B: {grace: x}")
    with pytest.raises(ValueError, match=r"B: grace is none of.*grace_sup"):
        report.read_models(file)


def test_evaluations_become_both_tables(compose, tiny_policy_folder, tmp_path, capsys):
    trained = Path(shutil.copytree(tiny_policy_folder, tmp_path / "runs" / "tiny" / "now" / "export"))
    shutil.copy(ROOT / "experiments" / "tiny_learning" / "curves.png", trained.parent / "similarities.png")
    small = ["size=small", "packages.test=[networkx,rich]", "max_new_tokens=3"]
    cfg = compose(*small, f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", config_name="evaluate")
    scores = evaluate.evaluate(cfg)  # Base, Base + reasoning, Trained
    models = tmp_path / "models.yaml"
    models.write_text(yaml.safe_dump({"tiny": {"base": str(tiny_policy_folder), "grace_sup": str(trained), "cl": "/never/evaluated"}}))
    where = ["--benchmark", "test", "--tracking-uri", str(cfg.paths.tracking_uri)]
    report.main([str(models), *where, "--output", str(tmp_path / "out")])
    table = csv.DictReader((tmp_path / "out" / "tables.csv").read_text().splitlines())
    numbers = {(n["table"], n["row"], n["column"]): n["ours"] for n in table}
    assert numbers["supervised", "Base", AVERAGE] == f"{100 * scores['Base'].average:.2f}"
    assert numbers["unsupervised", "+ reasoning", "Clustering"] == f"{100 * scores['Base + reasoning'].categories['Clustering']:.2f}"
    assert numbers["supervised", "GRACE", "Retrieval"] == f"{100 * scores['Trained'].categories['Retrieval']:.2f}"
    assert {numbers["supervised", "+ CL", AVERAGE], numbers["unsupervised", "GRACE", AVERAGE], numbers["supervised", "Base", "STS"]} == {""}
    shown = capsys.readouterr().out
    assert "| tiny | + CL | n/m |" in shown
    client = MlflowClient(cfg.paths.tracking_uri)
    (run,) = [run for run in mlflow_runs(client, cfg.project) if run.info.run_name == "paper tables: test"]
    logged = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert logged == {"tables.md", "tables.csv", "tables.png", "similarities_tiny_grace_sup.png"}
    with pytest.raises(SystemExit, match=r"^paper_tables: no evaluation on mteb_eng_v1 of a model in "):
        report.main([str(models), *where[2:], "--output", str(tmp_path / "none")])


def test_lengths_are_timed_and_scored(tiny_policy_folder, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    few = ["--packages", "networkx", "rich", "--size", "small", "--texts", "8", "--repeats", "1", "--lengths", "4", "0"]
    quality_latency.main(["--model", str(tiny_policy_folder), *few, "--tracking-uri", uri, "--output", str(tmp_path / "out")])
    first, second = csv.DictReader((tmp_path / "out" / "quality_latency.csv").read_text().splitlines())
    assert (first["length"], first["mean_tokens"], first["writing_ms"]) == ("0", "0.0", "0.0")
    assert 0 < float(second["mean_tokens"]) <= 4
    assert all(float(second[time]) > 0 for time in ("writing_ms", "encoding_ms"))
    assert first["average"] != second["average"]
    client = MlflowClient(uri)
    (run,) = mlflow_runs(client, "grace")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {f"quality_latency.{kind}" for kind in ("md", "csv", "png")}
