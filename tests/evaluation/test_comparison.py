import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from src.evaluation.comparison import Contender, comparison_table, contenders, how_it_was_found, latest_export, model_name
from src.evaluation.run_tasks import EvaluationScores
from src.utils.run_folder import list_run


def exported(root: Path, run: str, time: str, age: int) -> Path:
    folder = root / run / time / "export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "grace.json").write_text("{}")
    os.utime(folder / "config.json", (1000 - age, 1000 - age))
    return folder


def test_latest_export(tmp_path):
    assert latest_export(tmp_path) is None
    exported(tmp_path, "b_run", "2026-01-02", age=9)
    newest = exported(tmp_path, "a_run", "2026-01-01", age=1)
    (tmp_path / "c_run" / "2026-01-03" / "export").mkdir(parents=True)  # broken off: nothing in it
    assert latest_export(tmp_path) == newest


def test_latest_export_wherever_it_lies(tmp_path):
    root = tmp_path / "outputs"
    exported(root, "other_experiment", "2026-01-01", age=9)
    assert how_it_was_found(latest_export(root), root).endswith(": the only export")
    for place, age in ((root / "mine", 5), (root / "multirun" / "2026-01-02" / "3", 3), (tmp_path / "elsewhere", 1)):
        list_run(place, root)
        newest = exported(place.parent.parent, place.parent.name, place.name, age)
        assert latest_export(root) == newest
    list_run(tmp_path / "elsewhere", root)
    list_run(tmp_path / "elsewhere" / "export", root)  # is in it
    assert (root / "runs_elsewhere.txt").read_text() == f"{tmp_path}/elsewhere\n"
    said = how_it_was_found(newest, root)
    assert said.startswith(f"{newest}, of ")
    assert said.endswith(": the newest of 4 exports; model= names another")
    (newest / "config.json").unlink()  # removed since
    assert latest_export(root) == root / "multirun" / "2026-01-02" / "3" / "export"


def test_contenders(tmp_path):
    rows = (("Base", "none"), ("Base + reasoning", "both"))
    base = [Contender(name, "grace/a_policy", "/a/policy/weights", rationale) for name, rationale in rows]
    assert contenders(None, True, "/a/policy/weights", tmp_path) == base
    trained = exported(tmp_path, "run", "now", age=0)
    assert contenders(None, True, "/a/policy/weights", tmp_path) == [*base, Contender("Trained", "grace/run_now", str(trained), "both")]
    alone = Contender("m, without rationales", "some/m", "some/m", rationale="none")
    assert contenders("some/m", False, "weights", tmp_path) == [alone]
    assert contenders("some/m", False, "weights", tmp_path, name="me/own") == [replace(alone, model_name="me/own")]


def test_model_name():
    assert model_name("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    assert model_name("/x/outputs/tiny sup/2026-11-21/export") == "grace/tiny-sup_2026-11-21"
    assert model_name("/x/outputs/tiny_sup/2026-11-21/checkpoints/last.ckpt") == "grace/2026-11-21_last"


def test_model_is_read_as_trained(tmp_path):
    (row,) = contenders("some/m", None, "weights", tmp_path)
    assert row.settled("both") == replace(row, name="m", rationale="both")
    assert row.settled("none") == replace(row, name="m, without rationales", rationale="none")
    assert row.settled("query") == replace(row, name="m, rationales of queries", rationale="query")
    (named,) = contenders("some/m", True, "weights", tmp_path)
    assert named.settled("none") == named == replace(row, name="m, with rationales", rationale="both")


def test_comparison_table():
    full = EvaluationScores({"A": 0.5, "B": 0.25}, {"Retrieval": 0.375}, 0.375)
    half = EvaluationScores({"A": 0.125}, {"Retrieval": 0.125}, 0.125, failures={"B": "no data"})
    none = EvaluationScores({}, {}, float("nan"), failures={"A": "no data", "B": "no data"})
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(comparison_table({"one": full, "two": half, "three": none}, "title"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line]
    assert rows == [
        ["A", "50.00", "12.50", "failed"],
        ["B", "25.00", "failed", "failed"],
        ["Retrieval", "37.50", "12.50", "failed"],
        ["average", "37.50", "12.50 (1 of 2 tasks)", "failed"],
    ]
