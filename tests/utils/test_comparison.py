import os
from pathlib import Path

from rich.console import Console

from src.utils.comparison import Contender, comparison_table, contenders, latest_export
from src.utils.evaluation import EvaluationScores


def exported(root: Path, run: str, time: str, age: int) -> Path:
    folder = root / run / time / "export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (1000 - age, 1000 - age))
    return folder


def test_the_latest_export_of_any_run_is_found(tmp_path: Path) -> None:
    assert latest_export(tmp_path) is None
    exported(tmp_path, "b_run", "2026-01-02", age=9)
    newest = exported(tmp_path, "a_run", "2026-01-01", age=1)
    (tmp_path / "c_run" / "2026-01-03" / "export").mkdir(parents=True)  # broken off: nothing in it
    assert latest_export(tmp_path) == newest


def test_without_a_model_the_base_and_the_trained_policy_stand_side_by_side(tmp_path: Path) -> None:
    base = [Contender("Base", "weights", rationale=False), Contender("Base + reasoning", "weights", rationale=True)]
    assert contenders(None, True, "weights", tmp_path) == base
    trained = exported(tmp_path, "run", "now", age=0)
    assert contenders(None, True, "weights", tmp_path) == [*base, Contender("Trained", str(trained), rationale=True)]
    alone = [Contender("m, without rationales", "some/m", rationale=False)]
    assert contenders("some/m", False, "weights", tmp_path) == alone


def test_the_table_shows_tasks_categories_and_what_failed() -> None:
    whole = EvaluationScores({"A": 0.5, "B": 0.25}, {"Retrieval": 0.375}, 0.375)
    half = EvaluationScores({"A": 0.125}, {"Retrieval": 0.125}, 0.125, failures={"B": "no data"})
    none = EvaluationScores({}, {}, float("nan"), failures={"A": "no data", "B": "no data"})
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(comparison_table({"one": whole, "two": half, "three": none}, "title"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line]
    assert rows == [
        ["A", "50.00", "12.50", "failed"],
        ["B", "25.00", "failed", "failed"],
        ["Retrieval", "37.50", "12.50", "failed"],
        ["average", "37.50", "12.50", "failed"],
    ]
