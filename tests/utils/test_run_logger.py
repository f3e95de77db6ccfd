"""The MLflow logger and its outbox, against a real store, a full disk, and a real server that is killed and comes back."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric, _validate_param

from src.utils.data_contents import DataContents
from src.utils.outbox import Outbox
from src.utils.plain_errors import said
from src.utils.run_logger import RunLogger
from tests.programs import free_port
from tests.small_disk import small_disk

MakeLogger = Callable[..., RunLogger]
NEWS = "a report " * 9000


@pytest.fixture
def logger(tracking_uri: str, tmp_path: Path) -> MakeLogger:
    """Makes the logger of one run folder, as each process of a run does."""

    def make(**settings: object) -> RunLogger:
        given = {"tracking_uri": tracking_uri, "artifact_location": f"file://{tmp_path}/artifacts", "folder": str(tmp_path / "run")}
        return RunLogger(tmp_path.name, **given | settings)

    return make


def steps(logger: RunLogger, key: str = "loss") -> list[int]:
    return [point.step for point in logger.experiment.get_metric_history(logger.run_id, key)]


def status(logger: RunLogger) -> str:
    return str(logger.experiment.get_run(logger.run_id).info.status)


# ---- one run


def test_resumed_run_logs_everything_once(logger):
    first = logger()
    first.log_hyperparams({"rate": 1, "nested": {"a": "x" * 300}})
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step), "mteb/seconds": 0.1 * step}, step)
    first.log_table({"step": [3], "text": ["a"]}, "rationales/step_3.json")
    second = logger()  # the first was killed after a checkpoint of step 1
    second.log_hyperparams({"rate": 2, "new": 3})
    for step in (2, 3, 4):
        second.log_metrics({"loss": float(step), "mteb/seconds": 0.7}, step)
    for step in (3, 4):
        second.log_table({"step": [step], "text": ["a"]}, f"rationales/step_{step}.json")
    client, run_id = second.experiment, second.run_id
    assert (first.run_id, status(second)) == (run_id, "RUNNING")
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "loss")] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert [p.value for p in client.get_metric_history(run_id, "mteb/seconds")] == pytest.approx([0.1, 0.2, 0.3, 0.7])
    assert client.get_run(run_id).data.params == {"rate": "1", "nested/a": "x" * 300, "new": "3"}
    assert len(mlflow.artifacts.load_dict(f"runs:/{run_id}/rationales/step_3.json")["data"]) == 1
    second.finalize("success")
    assert status(second) == "FINISHED"


def test_message_sent_twice_is_one_point(logger):
    ours = logger()
    _ = ours.experiment
    for _ in range(2):
        ours._deliver({"call": "log_batch", "metrics": [["loss", 0.5, 1_700_000_000_000, 3]]})
    assert steps(ours) == [3]


def test_table_sent_twice_is_one_mlflow_table(logger):
    ours = logger()
    rows = {"step": [3, 3], "reward": [0.5, float("nan")], "text": ["a", 'é "quoted"']}
    client, run_id = ours.experiment, str(ours.run_id)
    for _ in range(2):
        ours.log_table(rows, "rationales/step_3.json")
    table = client.load_table(str(ours.experiment_id), "rationales/step_3.json", [run_id])
    assert (table["step"].tolist(), table["text"].tolist()) == ([3, 3], rows["text"])
    assert table["reward"].isna().tolist() == [False, True]
    client.log_table(run_id, rows, "theirs.json")
    ours_text, theirs = (mlflow.artifacts.load_text(f"runs:/{run_id}/{file}") for file in ("rationales/step_3.json", "theirs.json"))
    assert ours_text == theirs
    tables = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])  # read by MLflow's UI
    assert tables == [{"path": path, "type": "table"} for path in ("rationales/step_3.json", "theirs.json")]


@pytest.mark.parametrize("length", [251, 6000, 6001, 100_000])
def test_long_parameter_is_whole_or_visibly_cut(logger, length):
    ours, text = logger(), "a" * length
    ours.log_hyperparams({"instruction": text})
    kept = ours.experiment.get_run(ours.run_id).data.params["instruction"]
    if length <= 6000:
        assert kept == text
    else:
        assert len(kept) == 6000
        assert kept.endswith(f"a … [cut, of {length} characters; the whole is in config.yaml]")


NAMES = [
    "eval/task/检索",
    "eval/task/検索",
    "eval/task/Größe",
    "eval/task/Gro\u0308ße",
    "eval/task/हिन्दी",
    "eval/task/a:b",
    "eval/task/a;b",
    "a" * 400,
    *("a//b", "a/", "/a", "/x", "../x", "..x", "a/./b", "a/../b", ".", "..", "", "a/b", "./..x"),
    *("a(b)", "a+b", "x@y", "a" * 251, f"{'a' * 242}/{'b' * 9}", f"{'a' * 240}/../{'b' * 9}"),
]


def test_names_of_any_script_are_taken_and_differ(logger):
    ours = logger()
    ours.log_metrics({name: float(i) for i, name in enumerate(NAMES)}, 1)
    found = ours.experiment.get_run(ours.run_id).data.metrics
    assert sorted(found.values()) == list(range(len(NAMES)))
    assert {name: found[name] for name in NAMES[:3]} == {name: float(i) for i, name in enumerate(NAMES[:3])}
    ours.log_hyperparams({name: i for i, name in enumerate(NAMES)})
    params = ours.experiment.get_run(ours.run_id).data.params
    assert {name: int(value) for name, value in params.items()} == found
    for name in found:
        _validate_metric(name, 1.0, 0, 0)
        _validate_param(name, "1")


def test_data_is_linked_once(logger):
    ours, data = logger(), DataContents("texts.txt", "/data/texts.txt", "0123456789abcdef", 250, 240)
    for _ in range(2):
        ours.log_data(data, "training")
    ours.log_data(DataContents("STS", "mteb/sts", "a" * 40), "evaluation")
    training, evaluation = sorted(
        ours.experiment.get_run(ours.run_id).inputs.dataset_inputs, key=lambda found: found.dataset.name, reverse=True
    )
    assert (training.dataset.digest, json.loads(training.dataset.profile)) == ("0123456789abcdef", {"records": 250, "usable": 240})
    assert json.loads(training.dataset.source) == {"uri": "/data/texts.txt"}
    assert [found.tags[0].value for found in (training, evaluation)] == ["training", "evaluation"]


def test_model_has_the_scores_of_its_step(logger):
    ours = logger(run_name="a run: 1")
    for step in (4, 8):
        ours.log_metrics({"mteb/average": step / 10, "test/base/average": 0.1, "update/loss": 1.0}, step)
    ours.log_metrics({"test/grace/average": 0.7}, 8)
    for name, step in (("best", 4), ("export", 8)):
        ours.log_model(name, f"/runs/{name}", step)
    best, export = sorted(ours.experiment.search_logged_models([ours.experiment_id]), key=lambda model: model.name)
    assert (best.name, best.tags["path"], best.source_run_id) == ("a-run-1-best", "/runs/best", ours.run_id)
    assert {point.key: point.value for point in best.metrics} == {"mteb/average": 0.4}
    assert {point.key: point.value for point in export.metrics} == {"mteb/average": 0.8, "test/grace/average": 0.7}
    assert steps(ours, "mteb/average") == [4, 8]


def test_machine_is_watched_unless_switched_off(logger):
    first = logger(system_metrics=0.1)
    first.watch_machine()
    time.sleep(3)
    first.log_metrics({"loss": 1.0}, 1)
    first.finalize("success")
    watched = steps(first, "system/cpu_utilization_percentage")
    assert watched
    second = logger(system_metrics=0.1)
    second.log_metrics({"loss": 1.0}, 2)  # which is not taken for one of before, however many looks there were
    second.watch_machine()
    time.sleep(3)
    second.finalize("success")
    assert steps(second) == [1, 2]
    again = steps(second, "system/cpu_utilization_percentage")
    assert len(again) == len(set(again)) > len(watched)
    off = logger(folder=None, system_metrics=None)
    off.watch_machine()
    assert off._monitor is None


def test_experiment_has_a_description(logger):
    ours = logger()
    tags = ours.experiment.get_experiment(ours.experiment_id).tags
    assert "mteb/average" in tags["mlflow.note.content"]
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_artifact_location_is_of_local_stores_only(logger):
    assert logger(artifact_location="file:///here")._artifact_location == "file:///here"
    assert logger(artifact_location="file:///here", tracking_uri="http://localhost:5000")._artifact_location is None


# ---- what goes wrong


def test_refused_messages_are_dropped_and_named(logger, tmp_path, caplog):
    ours = logger()
    ours.experiment.log_param(ours.run_id, "rate", "1")
    values, files = Outbox(tmp_path / "run" / "unsent.jsonl"), Outbox(tmp_path / "run" / "unsent_files.jsonl")
    values.put({"call": "log_batch", "params": {"rate": "2"}})
    files.put({"call": "log_artifact", "local_path": str(tmp_path / "gone.png"), "artifact_path": "figures"})
    values.put({"call": "log_batch", "metrics": [["loss", 0.5, 1_700_000_000_000, 3]]})
    with caplog.at_level(logging.WARNING):
        ours.log_metrics({"loss": 1.0}, 4)
    assert steps(ours) == [3, 4]
    assert not values.waits
    assert not files.waits
    assert "MLflow refuses rate, which waited (" in caplog.text
    assert f"{tmp_path}/gone.png was removed before MLflow accepted it" in caplog.text


def test_refused_call_is_an_error(logger, tmp_path):
    ours = logger()
    ours.log_hyperparams({"rate": 1})
    with pytest.raises(MlflowException, match="rate"):
        ours.log_hyperparams({"rate": 2})
    assert not (tmp_path / "run" / "unsent.jsonl").exists()


def test_full_artifact_store_delays_files_only(logger, tmp_path, caplog):
    with small_disk(tmp_path / "disk", megabytes=1) as disk, caplog.at_level(logging.WARNING):
        settings = {"artifact_location": f"file://{disk}/artifacts", "seconds_between_tries": 0.0}
        ours = logger(**settings)
        ours.log_metrics({"loss": 1.0}, 1)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        ours.log_text(NEWS, "report.md")
        ours.log_metrics({"loss": 0.5}, 2)
        ours.log_table({"text": ["a" * 90_000]}, "table.json")
        assert caplog.text.count("does not store files ([Errno 28] No space left on device") == 1
        assert steps(ours) == [1, 2]
        ours.finalize("success")  # the run ends while the store stays full
        kept = tmp_path / "run" / "unsent_files.jsonl"
        assert f"MLflow still does not store files: unsent messages are in {kept}" in caplog.text
        assert status(ours) == "FINISHED"
        (disk / "filler").unlink()
        again = logger(**settings)  # the next process sends them
        again.log_metrics({"loss": 0.5}, 3)
        assert not kept.exists()
        assert mlflow.artifacts.load_text(f"runs:/{ours.run_id}/report.md") == NEWS


def test_unknown_run_is_one_line(logger, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef", "experiment_id": "1"}')
    with pytest.raises(RuntimeError, match=r"no run 0123456789abcdef.* remove .*/run/run\.json"):
        logger().log_metrics({"loss": 1.0}, 1)


def test_deleted_experiment_names_three_ways_out(logger, tmp_path):
    first = logger(folder=None)
    client, experiment = first.experiment, str(first.experiment_id)
    client.delete_experiment(experiment)
    with pytest.raises(
        RuntimeError, match=rf"was deleted.* experiments restore -x {experiment}\), .*mlflow gc .* {experiment}\)"
    ) as caught:
        logger(folder=None).log_metrics({"loss": 1.0}, 1)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("project=")
    client.restore_experiment(experiment)
    logger(folder=None).log_metrics({"loss": 1.0}, 1)


def test_deleted_run_is_one_line(logger):
    first = logger()
    first.log_metrics({"loss": 1.0}, 1)
    first.experiment.delete_run(first.run_id)
    with pytest.raises(
        RuntimeError, match=rf"{first.run_id}.* was deleted .* runs restore --run-id {first.run_id}\), or remove .*run.json"
    ):
        logger().log_metrics({"loss": 1.0}, 2)


def test_moved_folder_takes_its_artifacts_along(tmp_path, caplog):
    def log_in(folder: Path) -> RunLogger:
        ours = RunLogger("a", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"file://{folder}/artifacts")
        ours.log_text("a report", f"{folder.name}.md")
        return ours

    old, new = tmp_path / "old place", tmp_path / "new"
    old.mkdir()
    first = log_in(old)
    old.rename(new)
    with caplog.at_level(logging.WARNING, logger="src.utils.mlflow_store"):
        log_in(new)
        log_in(new)
    assert not old.exists()
    assert [record.message for record in caplog.records if record.name == "src.utils.mlflow_store"] == [
        f"MLflow looked for artifacts in file://{old}/artifacts, which is gone: this store's are in file://{new}/artifacts from now on"
    ]
    client = MlflowClient(f"sqlite:///{new}/mlflow.db")
    uri = client.get_run(first.run_id).info.artifact_uri
    assert mlflow.artifacts.load_text(f"{uri}/old place.md") == "a report"
    shutil.copytree(new, tmp_path / "copy")  # whose artifacts would go to the original
    with caplog.at_level(logging.WARNING, logger="src.utils.mlflow_store"):
        log_in(tmp_path / "copy")
    assert f"go to file://{new}/artifacts, as when it was begun, and not to file://{tmp_path}/copy/artifacts" in caplog.text


def test_missing_server_is_one_line(logger):
    with pytest.raises(ConnectionError, match=r"^no MLflow at http://me:\*\*\*@127.0.0.1:\d+: .*logger=none$") as caught:
        logger(tracking_uri=f"http://me:secret@127.0.0.1:{free_port()}").log_metrics({"loss": 1.0}, 1)
    assert "secret" not in str(caught.value)


UNUSABLE = {
    "./mlruns": "is in maintenance mode",
    "foo://bar": "unsupported URI 'foo://bar'",
    "sqlite:///damaged.db": "file is not a database",
    "postgresql://me:secret@localhost/runs": "No module named 'psycopg",
}


@pytest.mark.parametrize("uri", UNUSABLE)
def test_unusable_store_is_one_line(logger, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    Path("damaged.db").write_text("no database, " * 9)
    with pytest.raises(ConnectionError, match=r"^no MLflow at [^\n]*logger=none$") as caught:
        logger(tracking_uri=uri)
    assert UNUSABLE[uri] in str(caught.value)
    assert "secret" not in str(caught.value)
    wrapped = {"_target_": "src.utils.run_logger.RunLogger", "experiment_name": "x", "tracking_uri": uri}
    with pytest.raises(InstantiationException) as within:
        instantiate(wrapped)
    assert said(within.value) == str(caught.value)


def test_empty_uri_is_the_default_store(logger, monkeypatch, tracking_uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    assert logger(tracking_uri="")._tracking_uri == tracking_uri


@contextmanager
def server(store: str, artifacts: Path, port: int) -> Iterator[None]:
    """A real MLflow server; it answers when this returns."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(artifacts.parent / "server.log", "ab") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it starts sooner
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(900)  # two starts of a server: seconds on an idle machine, minutes on a busy one
def test_server_that_goes_and_returns_misses_nothing(logger, tracking_uri, tmp_path, caplog):
    port, folder = free_port(), tmp_path / "run"
    settings = {"tracking_uri": f"http://127.0.0.1:{port}", "seconds_between_tries": 0.2}
    first = logger(**settings)
    with server(tracking_uri, tmp_path / "artifacts", port):
        for step in (1, 2):
            first.log_metrics({"loss": float(step)}, step)
    with caplog.at_level(logging.WARNING, logger="src.utils.run_logger"):
        start = time.monotonic()
        for step in (3, 4, 5):
            first.log_metrics({"loss": float(step)}, step)
            time.sleep(0.15)  # a try in between finds it still away
        first.log_table({"step": [5], "text": ["a"]}, "rationales/step_5.json")
        first.log_text("a report", "report.md")
        first.log_figure(Figure(), "figures/empty.png")
        assert time.monotonic() - start < 60
        first.finalize("failed")  # the process ends
    said = [record.message for record in caplog.records if record.name == "src.utils.delivery"]
    assert len(said) == 2  # once, and at the end
    assert f"http://127.0.0.1:{port} does not answer" in said[0]
    assert f"in {folder}/unsent.jsonl and {folder}/unsent_files.jsonl" in said[1]
    second = logger(**settings)  # resumes from a checkpoint of step 3, and the server is still away
    second.log_metrics({"loss": 4.0}, 4)
    with server(tracking_uri, tmp_path / "artifacts", port):
        time.sleep(0.2)
        for step in (5, 6):
            second.log_metrics({"loss": float(step)}, step)
        second.finalize("success")
        run_id = str(second.run_id)
        assert run_id == first.run_id
        assert steps(second) == [1, 2, 3, 4, 5, 6]
        assert status(second) == "FINISHED"
        assert mlflow.artifacts.load_text(f"runs:/{run_id}/report.md") == "a report"
        assert mlflow.artifacts.load_dict(f"runs:/{run_id}/rationales/step_5.json")["data"] == [[5, "a"]]
        assert [file.path for file in second.experiment.list_artifacts(run_id, "figures")] == ["figures/empty.png"]
    assert "messages that waited were sent" in caplog.text
    assert not (folder / "unsent.jsonl").exists()


# ---- the outbox


def test_outbox_keeps_order_over_processes(tmp_path):
    box = Outbox(tmp_path / "new" / "unsent.jsonl")
    assert not box.waits
    for number in range(3):
        box.put({"number": number})
    with open(box.file, "a") as file:
        file.write('{"number": 3')  # the process was killed here
    again = Outbox(box.file, seconds_between_tries=0)
    assert [message["number"] for message in again.messages()] == [0, 1, 2]
    again.put({"number": 4})
    sent = []

    def send(message):
        if len(sent) == 2:
            return False
        sent.append(message)
        return True

    assert again.empty(send) == 2
    assert list(again.messages()) == [{"number": 2}, {"number": 4}]
    sent.clear()
    assert again.empty(send) == 2
    assert not again.waits
    assert again.empty(send) == 0


def test_outbox_waits_between_tries(tmp_path):
    box = Outbox(tmp_path / "unsent.jsonl", seconds_between_tries=0.2)
    box.put({})
    assert not box.is_due
    assert Outbox(box.file, seconds_between_tries=0.2).is_due  # a new process tries at once
    assert box.empty(lambda message: bool(time.sleep(0.3))) == 0
    assert not box.is_due  # the wait starts at the end of a try
