"""Two runs in a real store, side by side."""

import pytest

from src.callbacks.compare_runs import main
from src.utils.run_logger import RunLogger


def logged(folder, uri, name, rate, text, score):
    run = RunLogger(
        folder.name, tracking_uri=uri, run_name=name, folder=str(folder / name / "mlflow"), artifact_location=f"file://{folder}/artifacts"
    )
    run.log_hyperparams({"module.learning_rate": rate, "module.num_generations": 8, "paths.output_dir": name})
    run.log_metrics({"test/grace/average": score, "seconds/batch": 2.0}, 4)
    table = {"step": [4], "text": ["a text"], "rationale": [text], "length": [3], "finished": [True], "total": [0.5]}
    run.log_table(table, "rationales/step_4.json")
    run.finalize("success")
    return run


def test_what_differs_is_printed(tmp_path, tracking_uri, capsys):
    first = logged(tmp_path, tracking_uri, "one", 1e-3, "a graph [of] nodes", 0.25)
    logged(tmp_path, tracking_uri, "two", 1e-4, "a tree", 0.5)
    main([str(first.run_id), str(tmp_path / "two"), "--tracking-uri", tracking_uri])
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert ["module.learning_rate", "0.001", "0.0001"] in rows
    assert ["test/grace/average", "0.25", "0.5", "+0.25"] in rows
    assert ["seconds/batch", "2", "2", ""] in rows
    assert ["a text", "a graph [of] nodes", "a tree"] in rows
    assert "num_generations" not in shown
    assert "output_dir" not in shown


def test_unknown_run_is_one_line(tracking_uri):
    with pytest.raises(SystemExit, match=r"^compare_runs: no run 'nothing' in "):
        main(["nothing", "nothing", "--tracking-uri", tracking_uri])
