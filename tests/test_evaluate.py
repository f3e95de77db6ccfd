import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

import evaluate
from tests.conftest import Compose

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
