import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

import evaluate
from tests.conftest import Compose
from tests.own_files import write_own_tasks
from tests.programs import Program, Programs

PATIENCE = 600
"""Seconds for a process of a few seconds' work, on a machine that may be busy with others."""

SMALL = ["size=small", "packages.test=[networkx,rich]"]


def test_base_and_trained_policy_stand_side_by_side(
    compose: Compose, tiny_policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "runs" / "tiny" / "now" / "export"
    shutil.copytree(tiny_policy_folder, trained)
    cfg = compose(*SMALL, f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", "max_new_tokens=3", config_name="evaluate")
    scores = evaluate.evaluate(cfg)
    assert list(scores) == ["Base", "Base + reasoning", "Trained"]
    assert scores["Trained"].tasks == scores["Base + reasoning"].tasks  # the same weights
    assert scores["Base"].tasks != scores["Base + reasoning"].tasks
    shown = capsys.readouterr().out
    assert f"Trained: {trained}" in shown
    assert f"{100 * scores['Base'].average:.2f}" in shown
    assert len(list(Path(cfg.results_dir).rglob("DocstringRetrieval.json"))) == 3
    client = MlflowClient(cfg.paths.tracking_uri)
    experiment = client.get_experiment_by_name(cfg.project)
    runs = {run.info.run_name: run.data for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {f"evaluate: {row}" for row in scores}
    for row, found in scores.items():
        data = runs[f"evaluate: {row}"]
        assert data.metrics == pytest.approx(found.flat("eval/"))
        assert data.params["rationale"] == str(row != "Base")


def test_without_a_trained_policy_it_says_how_to_make_one(
    compose: Compose, tiny_policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", "max_new_tokens=1", "~logger"]
    assert list(evaluate.evaluate(compose(*SMALL, *options, config_name="evaluate"))) == ["Base", "Base + reasoning"]
    assert f"No trained policy under {tmp_path}/runs: `python train.py` makes one." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=/nowhere", r"^evaluate.py: no model at /nowhere: name an exported folder"),
        ("model=/nowhere/last.ckpt", r"^evaluate.py: no checkpoint at /nowhere/last.ckpt"),
        ("benchmark=[NoSuchTask]", r"^evaluate.py: MTEB has no task or benchmark named 'NoSuchTask'"),
        ("size=huge", r"^evaluate.py: offline tasks of size 'huge' do not exist"),
    ],
)
def test_what_is_missing_is_one_line(compose: Compose, tiny_policy_folder: Path, override: str, message: str) -> None:
    cfg = compose(f"base={tiny_policy_folder}", override, config_name="evaluate")
    with pytest.raises(SystemExit, match=message) as caught:
        evaluate.evaluate(cfg)
    assert "\n" not in str(caught.value)


EVERYDAY = ["WordNetRetrieval", "WordNetSimilarity", "WordNetClassification", "WordNetPairs"]


def test_everyday_english_is_scored_beside_docstrings(compose: Compose, tiny_policy_folder: Path) -> None:
    for benchmark, size, count in (("everyday", "large", 4), ("[test,everyday]", "mini", 9), ("[everyday,BIOSSES]", "small", 5)):
        cfg = compose(f"benchmark={benchmark}", f"size={size}", config_name="evaluate")
        found = [task.metadata.name for task in evaluate.load_tasks(cfg)]
        assert (len(found), set(EVERYDAY) <= set(found)) == (count, True)
    options = ["benchmark=everyday", "size=small", "rationale=false", "~logger", f"model={tiny_policy_folder}"]
    (scores,) = evaluate.evaluate(compose(*options, config_name="evaluate")).values()
    assert (list(scores.tasks), scores.failures) == (EVERYDAY, {})


def test_an_everyday_size_that_does_not_exist_is_named(compose: Compose) -> None:
    with pytest.raises(ValueError, match=r"everyday tasks of size 'huge' do not exist; sizes are mini, small, large"):
        evaluate.load_tasks(compose("benchmark=everyday", "size=huge", config_name="evaluate"))


def command(programs: Programs, tmp_path: Path, policy: Path, *settings: str) -> Program:
    """evaluate.py as a process of its own, with everything that it writes in tmp_path."""
    places = [f"paths.output_root={tmp_path}/outputs", f"embeddings.folder={tmp_path}/embeddings", f"data_dir={tmp_path}/data"]
    return programs.start("evaluate.py", f"model={policy}", "max_new_tokens=4", "~logger", *places, *settings)


def whole_results(results: Path) -> list[Path]:
    """MTEB's files of finished tasks: what is being written lies aside, and comes and goes."""
    return list(results.glob("results/*/*/experiments/*/Docstring*.json"))


def stored(folder: Path) -> dict[str, Any]:
    """Scores by task of MTEB's result files. What a killed process was writing still lies aside, in a folder with a dot."""
    files = [file for file in folder.rglob("*.json") if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    found = [json.loads(file.read_text()) for file in files if file.name != "model_meta.json"]
    return {result["task_name"]: result["scores"] for result in found}


@pytest.mark.timeout(3 * PATIENCE)
def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_been(
    programs: Programs, compose: Compose, tiny_policy_folder: Path, tmp_path: Path
) -> None:
    results = tmp_path / "outputs" / "mteb"
    killed = command(programs, tmp_path, tiny_policy_folder, *SMALL)
    until = time.monotonic() + PATIENCE
    while not whole_results(results) and time.monotonic() < until:
        assert killed.poll() is None, killed.stderr.read_text()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {file: file.stat().st_mtime_ns for file in whole_results(results)}
    assert 1 <= len(done) < 5
    half_written = next(iter(done))
    left = results / ".writing-left" / half_written.relative_to(results)  # as by a kill between opening a file and its first byte
    left.parent.mkdir(parents=True)
    left.touch()
    again = command(programs, tmp_path, tiny_policy_folder, *SMALL)
    assert again.wait(PATIENCE) == 0, again.stderr.read_text()
    assert {file: file.stat().st_mtime_ns for file in done} == done  # finished tasks are not repeated
    whole = compose(*SMALL, f"model={tiny_policy_folder}", "max_new_tokens=4", "~logger", config_name="evaluate")
    evaluate.evaluate(whole)  # uninterrupted, with no cache that it shares
    assert len(stored(results)) == 5
    assert stored(results) == stored(Path(whole.results_dir))


@pytest.mark.timeout(3 * PATIENCE)
def test_tasks_without_data_are_named_and_the_others_are_scored(programs: Programs, tiny_policy_folder: Path, tmp_path: Path) -> None:
    write_own_tasks(tmp_path / "data")
    run = command(programs, tmp_path, tiny_policy_folder, "benchmark=[BIOSSES,MySTS,Banking77Classification,MyPairs,CQADupstackRetrieval]")
    assert run.wait(PATIENCE) == 1
    shown, errors = run.stdout.read_text(), run.stderr.read_text()
    message = errors[errors.index("evaluate.py: ") :].splitlines()
    assert message[0] == "evaluate.py: 3 of 5 tasks have no score"
    reasons = dict(line.strip().split(": ", 1) for line in message[1:])
    assert list(reasons) == ["BIOSSES", "Banking77Classification", "CQADupstackRetrieval"]
    assert reasons["BIOSSES"] == "Couldn't reach 'mteb/biosses-sts' on the Hub (OfflineModeIsEnabled)"
    assert reasons["CQADupstackRetrieval"].startswith("CQADupstackAndroidRetrieval: Couldn't reach")
    assert set(stored(tmp_path / "outputs")) == {"MySTS", "MyPairs"}
    assert "(2 of 5 tasks)" in " ".join(shown.split())
    assert shown.count("failed") == 3


def test_a_task_that_has_no_data_is_tried_for_the_first_row_alone(
    compose: Compose, tiny_policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", "max_new_tokens=1", "~logger", "benchmark=BIOSSES"]
    scores = evaluate.evaluate(compose(*options, config_name="evaluate"))
    assert [list(row.failures) for row in scores.values()] == [["BIOSSES"], ["BIOSSES"]]
    assert sum("BIOSSES (1 of 1) has no score" in record.message for record in caplog.records) == 1


@pytest.mark.slow  # of the shipped policy and the large tasks, as `python evaluate.py` runs them; minutes without the caches
def test_a_second_evaluation_is_at_least_twenty_times_as_fast(compose: Compose) -> None:
    cfg = compose("~logger", config_name="evaluate")
    evaluate.load_tasks(cfg)  # docstrings are read once, whatever is scored on them
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        evaluate.evaluate(cfg)
        seconds.append(time.monotonic() - began)
    assert seconds[0] >= 20 * seconds[1], seconds


def test_general_abilities_stand_beside_those_of_the_base(
    compose: Compose, tiny_policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    trained = Path(shutil.copytree(tiny_policy_folder, tmp_path / "export"))
    asked = ["abilities.tasks=offline", "abilities.packages=[networkx]", "abilities.count=8"]
    cfg = compose(*asked, *SMALL, f"base={tiny_policy_folder}", f"model={trained}", "rationale=false", config_name="evaluate")
    evaluate.evaluate(cfg)
    assert "General abilities of export beside" in capsys.readouterr().out
    assert "| docstring_choice | acc |" in Path(cfg.paths.output_dir, "abilities_export.md").read_text()
    client = MlflowClient(cfg.paths.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name(cfg.project).experiment_id])
    (run,) = [run for run in runs if run.info.run_name == "evaluate: abilities of export"]
    assert run.data.metrics["abilities/docstring_text/gain"] == 0.0  # the same weights
