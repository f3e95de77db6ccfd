"""evaluate.py: comparisons of policies, settings, tasks, evaluations that are killed or lack their data."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

import evaluate
from src.evaluation.setup import load_tasks, make_encoder
from src.modules.encoder.export import load_policy
from src.modules.rollouts.hf import HFEngine
from tests.own_files import describe, write_own_tasks
from tests.programs import Program, Programs, free_port
from tests.runs import mlflow_runs

PATIENCE = 600
"""Seconds for a process of a few seconds' work, on a machine that may be busy with others."""

SMALL = ["size=small", "packages.test=[networkx,rich]"]
EVERYDAY = ["WordNetRetrieval", "WordNetSimilarity", "WordNetClassification", "WordNetPairs"]


def test_base_and_trained_policy_side_by_side(compose, tiny_policy_folder, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    trained = tmp_path / "runs" / "tiny" / "now" / "of another name"
    shutil.copytree(tiny_policy_folder, trained)
    cfg = compose(*SMALL, f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", "max_new_tokens=3", config_name="evaluate")
    scores = evaluate.evaluate(cfg)
    assert list(scores) == ["Base", "Base + reasoning", "Trained"]
    assert scores["Trained"].tasks == scores["Base + reasoning"].tasks  # the same weights
    assert scores["Base"].tasks != scores["Base + reasoning"].tasks
    shown = capsys.readouterr().out
    assert f"Trained: {trained}" in shown
    assert "the only export" in caplog.text
    assert f"{100 * scores['Base'].average:.2f}" in shown
    assert len(list(Path(cfg.results_dir).rglob("DocstringRetrieval.json"))) == 3
    client = MlflowClient(cfg.paths.tracking_uri)
    runs = {run.info.run_name: run.data for run in mlflow_runs(client, cfg.project)}
    assert runs.keys() == {f"evaluate: {row}" for row in scores}
    for row, found in scores.items():
        data = runs[f"evaluate: {row}"]
        assert data.metrics == pytest.approx(found.flat("eval/"))
        assert data.params["rationale"] == ("none" if row == "Base" else "both")


@pytest.mark.parametrize("store", ["absent", "deleted", "damaged"])
def test_store_that_cannot_be_had_loses_nothing(compose, tiny_policy_folder, tmp_path, tracking_uri, capsys, caplog, store):
    uri = {"deleted": tracking_uri, "damaged": f"sqlite:///{tmp_path}/damaged.db"}.get(store, f"http://127.0.0.1:{free_port()}")
    (tmp_path / "damaged.db").write_text("no database, " * 9)
    describe(write_own_tasks(tmp_path / "data"), "检索", "STS", "data: sts.tsv\ncolumns: [score, sentence1, sentence2]")
    places = ["benchmark=['检索']", f"data_dir={tmp_path / 'data'}", f"project={tmp_path.name}"]
    cfg = compose(*places, f"model={tiny_policy_folder}", "rationale=false", config_name="evaluate")
    cfg.paths.tracking_uri = uri
    if store == "deleted":
        client = MlflowClient(uri)
        client.delete_experiment(client.create_experiment(tmp_path.name))
    (scores,) = evaluate.evaluate(cfg).values()
    assert f"{100 * scores.average:.2f}" in capsys.readouterr().out
    file = Path(cfg.paths.output_dir, "scores.json")
    assert [found["tasks"] for found in json.loads(file.read_text()).values()] == [scores.tasks]
    (said,) = [record.message for record in caplog.records if "not in MLflow" in record.message]
    assert f"but in {file}; the same command sends them" in said
    cfg.paths.tracking_uri, cfg.project = tracking_uri, f"{tmp_path.name}_again"
    evaluate.evaluate(cfg)
    (run,) = mlflow_runs(MlflowClient(tracking_uri), cfg.project)
    assert run.data.metrics == pytest.approx(scores.flat("eval/"), abs=1e-5)  # as result files round them


def test_everyday_english(compose, tiny_policy_folder):
    for benchmark, size, count in (("everyday", "large", 4), ("[test,everyday]", "mini", 9), ("[everyday,BIOSSES]", "small", 5)):
        found = [task.metadata.name for task in load_tasks(compose(f"benchmark={benchmark}", f"size={size}", config_name="evaluate"))]
        assert (len(found), set(EVERYDAY) <= set(found)) == (count, True)
    options = ["benchmark=everyday", "size=small", "rationale=false", "~logger", f"model={tiny_policy_folder}"]
    (scores,) = evaluate.evaluate(compose(*options, config_name="evaluate")).values()
    assert (list(scores.tasks), scores.failures) == (EVERYDAY, {})


# ---- settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=/nowhere"], "no model at /nowhere"),
        (["model=/nowhere/last.ckpt"], "no checkpoint at /nowhere/last.ckpt"),
        (["benchmark=[NoSuchTask]"], "'NoSuchTask'"),
        (["benchmark=[]"], "benchmark names no task"),
        (["benchmark=[test,validation]"], "test and validation"),
        (["size=huge"], "offline tasks of size 'huge'"),
        (["size=huge", "benchmark=everyday"], "everyday tasks of size 'huge'"),
        (["max_prompt_tokens=5"], "max_prompt_tokens=5 leaves no room"),
        (["max_prompt_tokens=0"], "max_prompt_tokens=0"),
    ],
)
def test_wrong_setting_is_one_line(compose, tiny_policy_folder, overrides, message):
    cfg = compose(f"base={tiny_policy_folder}", *overrides, config_name="evaluate")
    with pytest.raises(SystemExit, match=rf"^evaluate.py: .*{message}") as caught:
        evaluate.evaluate(cfg)
    assert "\n" not in str(caught.value)


def test_prompts_are_the_models_or_as_named(compose, tiny_policy_folder):
    policy, own = load_policy(tiny_policy_folder)
    named = ["instruction=Name it.", "max_prompt_tokens=77", "template_kwargs={enable_thinking: false}"]
    asked = make_encoder(compose(*named, "device=cpu", config_name="evaluate"), policy, own, rationale=True).settings
    assert (asked.instruction, asked.max_prompt_tokens, asked.template_kwargs) == ("Name it.", 77, {"enable_thinking": False})
    assert type(asked.template_kwargs) is dict
    assert make_encoder(compose("device=cpu", config_name="evaluate"), policy, own, rationale=True).settings == own


class PreparedEngine(HFEngine):
    """An engine that must know the longest prompt, as vLLM's."""

    def __init__(self, max_new_tokens: int, max_prompt_tokens: int = 1024) -> None:
        super().__init__(max_new_tokens)
        self.max_prompt_tokens = max_prompt_tokens


@pytest.mark.parametrize(("named", "longest"), [([], 96), (["max_prompt_tokens=200"], 200)])
def test_engine_is_told_the_longest_prompt(compose, tiny_policy_folder, named, longest):
    engine = "{_target_: tests.test_evaluate.PreparedEngine, _partial_: true, max_prompt_tokens: 1024}"
    cfg = compose(*named, "device=cpu", "~engine", f"+engine={engine}", config_name="evaluate")
    encoder = make_encoder(cfg, *load_policy(tiny_policy_folder), rationale=True)
    assert isinstance(encoder.engine, PreparedEngine)
    assert encoder.engine.max_prompt_tokens == encoder.settings.max_prompt_tokens == longest


# ---- as a process


def command(programs: Programs, tmp_path: Path, policy: Path, *settings: str) -> Program:
    """evaluate.py as a process, with everything that it writes in tmp_path."""
    places = [f"paths.output_root={tmp_path}/outputs", f"embeddings.folder={tmp_path}/embeddings", f"data_dir={tmp_path}/data"]
    return programs.start("evaluate.py", f"model={policy}", "max_new_tokens=4", "~logger", *places, *settings)


def finished_tasks(results: Path) -> list[Path]:
    return list(results.glob("results/*/*/experiments/*/Docstring*.json"))


def stored(folder: Path) -> dict[str, Any]:
    """Scores by task of MTEB's result files, without the folders (with a dot) in which a killed process was writing."""
    files = [file for file in folder.rglob("*.json") if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    found = [json.loads(file.read_text()) for file in files if file.name not in ("model_meta.json", "scores.json")]
    return {result["task_name"]: result["scores"] for result in found}


@pytest.mark.timeout(3 * PATIENCE)
def test_killed_evaluation_resumes(programs, compose, tiny_policy_folder, tmp_path):
    results = tmp_path / "outputs" / "mteb"
    killed = command(programs, tmp_path, tiny_policy_folder, *SMALL)
    until = time.monotonic() + PATIENCE
    while not finished_tasks(results) and time.monotonic() < until:
        assert killed.poll() is None, killed.stderr.read_text()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {file: file.stat().st_mtime_ns for file in finished_tasks(results)}
    assert 1 <= len(done) < 5
    half_written = next(iter(done))
    left = results / ".writing-left" / half_written.relative_to(results)  # as by a kill between opening a file and its first byte
    left.parent.mkdir(parents=True)
    left.touch()
    again = command(programs, tmp_path, tiny_policy_folder, *SMALL)
    assert again.wait(PATIENCE) == 0, again.stderr.read_text()
    assert {file: file.stat().st_mtime_ns for file in done} == done  # finished tasks are not repeated
    uninterrupted = compose(*SMALL, f"model={tiny_policy_folder}", "max_new_tokens=4", "~logger", config_name="evaluate")
    evaluate.evaluate(uninterrupted)  # with no cache that it shares
    assert len(stored(results)) == 5
    assert stored(results) == stored(Path(uninterrupted.results_dir))


@pytest.mark.timeout(3 * PATIENCE)
def test_tasks_without_data_are_named(programs, tiny_policy_folder, tmp_path):
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


def test_task_without_data_is_tried_once(compose, tiny_policy_folder, tmp_path, caplog, capsys):
    options = [f"base={tiny_policy_folder}", f"paths.output_root={tmp_path}/runs", "max_new_tokens=1", "~logger", "benchmark=BIOSSES"]
    scores = evaluate.evaluate(compose(*options, config_name="evaluate"))
    assert list(scores) == ["Base", "Base + reasoning"]
    assert [list(row.failures) for row in scores.values()] == [["BIOSSES"], ["BIOSSES"]]
    assert sum("BIOSSES (1 of 1) has no score" in record.message for record in caplog.records) == 1
    assert f"No trained policy under {tmp_path}/runs: `python train.py` makes one." in capsys.readouterr().out


@pytest.mark.slow  # of the shipped policy and the large tasks, as `python evaluate.py` runs them; minutes without the caches
def test_second_evaluation_is_much_faster(compose):
    cfg = compose("~logger", config_name="evaluate")
    load_tasks(cfg)  # docstrings are read once, whatever is scored on them
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        evaluate.evaluate(cfg)
        seconds.append(time.monotonic() - began)
    assert seconds[0] >= 20 * seconds[1], seconds
