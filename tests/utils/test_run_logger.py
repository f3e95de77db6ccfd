"""The MLflow logger against a real store and a real server that is killed and comes back."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from src.utils.outbox import Outbox
from src.utils.run_logger import RunLogger
from tests.small_disk import small_disk


def steps(client: MlflowClient, run_id: str, key: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


@pytest.fixture
def logger(tracking_uri: str, tmp_path: Path) -> Callable[[], RunLogger]:
    """Makes the logger of one run folder, as each process of a run does."""
    settings = {"tracking_uri": tracking_uri, "artifact_location": f"file://{tmp_path}/artifacts"}
    return lambda: RunLogger(tmp_path.name, folder=str(tmp_path / "run"), **settings)


def test_a_run_that_goes_on_is_the_same_run_and_holds_everything_once(logger: Callable[[], RunLogger]) -> None:
    first = logger()
    first.log_hyperparams({"rate": 1, "nested": {"a": "x" * 300}})
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step), "mteb/seconds": 0.1 * step}, step)
    first.log_table({"step": [3], "text": ["a"]}, "rationales/step_3.json")
    second = logger()  # the first was killed; its checkpoint was of step 1, so 2 and 3 are done again
    second.log_hyperparams({"rate": 2, "new": 3})
    for step in (2, 3, 4):
        second.log_metrics({"loss": float(step), "mteb/seconds": 0.7}, step)
    second.log_table({"step": [3], "text": ["a"]}, "rationales/step_3.json")
    second.log_table({"step": [4], "text": ["b"]}, "rationales/step_4.json")
    client, run_id = second.experiment, second.run_id
    assert first.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "loss")] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert [p.value for p in client.get_metric_history(run_id, "mteb/seconds")] == pytest.approx([0.1, 0.2, 0.3, 0.7])
    params = client.get_run(run_id).data.params
    assert params == {"rate": "1", "nested/a": "x" * 250, "new": "3"}
    assert len(mlflow.artifacts.load_dict(f"runs:/{run_id}/rationales/step_3.json")["data"]) == 1
    second.finalize("success")
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_message_that_is_sent_twice_is_one_point(logger: Callable[[], RunLogger]) -> None:
    ours = logger()
    client, run_id = ours.experiment, str(ours.run_id)
    for _ in range(2):
        ours._deliver({"call": "log_batch", "metrics": [["loss", 0.5, 1_700_000_000_000, 3]]})
    assert steps(client, run_id, "loss") == [3]


def test_a_table_that_is_sent_twice_is_one_table_of_mlflow_s_own_kind(logger: Callable[[], RunLogger]) -> None:
    ours = logger()
    rows = {"step": [3, 3], "reward": [0.5, float("nan")], "text": ["a", 'é "quoted"']}
    client, run_id = ours.experiment, str(ours.run_id)
    for _ in range(2):
        ours.log_table(rows, "rationales/step_3.json")
    table = client.load_table(str(ours.experiment_id), "rationales/step_3.json", [run_id])
    assert table["step"].tolist() == [3, 3]
    assert table["text"].tolist() == rows["text"]
    assert table["reward"].isna().tolist() == [False, True]
    client.log_table(run_id, rows, "theirs.json")
    theirs = mlflow.artifacts.load_text(f"runs:/{run_id}/theirs.json")
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/rationales/step_3.json") == theirs
    tables = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])  # what its UI goes by
    assert tables == [{"path": path, "type": "table"} for path in ("rationales/step_3.json", "theirs.json")]


def test_a_run_with_other_settings_is_another_one_tagged_with_the_first(logger: Callable[[], RunLogger], tmp_path: Path) -> None:
    first = logger()
    first.log_metrics({"loss": 1.0}, 1)
    second = logger()
    second.begin_anew()
    second.log_metrics({"loss": 2.0}, 1)
    client = second.experiment
    assert second.run_id != first.run_id
    assert client.get_run(str(second.run_id)).data.tags["resumed_from"] == first.run_id
    assert [run.data.metrics["loss"] for run in client.search_runs([str(second.experiment_id)])] == [2.0, 1.0]
    third = logger()
    assert third.resumed
    assert third.run_id == second.run_id
    assert (tmp_path / "run" / f"run_{first.run_id}.json").exists()


def test_what_waited_and_is_refused_is_left_out_and_named(
    logger: Callable[[], RunLogger], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = logger()
    client, run_id = ours.experiment, str(ours.run_id)
    client.log_param(run_id, "rate", "1")
    waiting = Outbox(tmp_path / "run" / "unsent.jsonl")
    waiting.put({"call": "log_batch", "params": {"rate": "2"}})
    files = Outbox(tmp_path / "run" / "unsent_files.jsonl")
    files.put({"call": "log_artifact", "local_path": str(tmp_path / "gone.png"), "artifact_path": "figures"})
    waiting.put({"call": "log_batch", "metrics": [["loss", 0.5, 1_700_000_000_000, 3]]})
    with caplog.at_level(logging.WARNING):
        ours.log_metrics({"loss": 1.0}, 4)
    assert steps(client, run_id, "loss") == [3, 4]
    assert not waiting.waits
    assert not files.waits
    said = [record.message for record in caplog.records]
    assert any(line.startswith("MLflow refuses rate, which waited (") for line in said)
    assert f"{tmp_path}/gone.png is gone before MLflow was sent it: it is left out" in said


def test_a_full_disk_below_the_store_s_files_does_not_end_a_run(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        settings = {"tracking_uri": tracking_uri, "artifact_location": f"file://{disk}/artifacts"}
        ours = RunLogger(tmp_path.name, folder=str(tmp_path / "run"), seconds_between_tries=0.0, **settings)
        ours.log_metrics({"loss": 1.0}, 1)
        (disk / "someone_elses").write_bytes(bytes(shutil.disk_usage(disk).free))
        with caplog.at_level(logging.WARNING):
            ours.log_text("a report " * 9000, "report.md")
            ours.log_metrics({"loss": 0.5}, 2)
            ours.log_table({"text": ["a" * 90_000]}, "table.json")
        assert caplog.text.count(f"MLflow at {tracking_uri} does not store files ([Errno 28] No space left on device") == 1
        assert steps(ours.experiment, str(ours.run_id), "loss") == [1, 2]  # the store of files keeps no metric back
        (disk / "someone_elses").unlink()
        ours.finalize("success")
        assert mlflow.artifacts.load_text(f"runs:/{ours.run_id}/report.md") == "a report " * 9000
        assert ours.experiment.get_run(str(ours.run_id)).info.status == "FINISHED"


def test_a_store_that_stays_full_lets_a_run_end_and_the_next_process_sends_its_files(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        settings = {"tracking_uri": tracking_uri, "artifact_location": f"file://{disk}/artifacts"}

        def logger() -> RunLogger:
            return RunLogger(tmp_path.name, folder=str(tmp_path / "run"), seconds_between_tries=0.0, **settings)

        ours = logger()
        ours.log_metrics({"loss": 1.0}, 1)
        (disk / "someone_elses").write_bytes(bytes(shutil.disk_usage(disk).free))
        with caplog.at_level(logging.WARNING):
            ours.log_text("a report " * 9000, "report.md")
            ours.finalize("success")
        kept = tmp_path / "run" / "unsent_files.jsonl"
        assert f"MLflow still does not store files: what it was not sent is in {kept}, and goes with" in caplog.text
        assert ours.experiment.get_run(str(ours.run_id)).info.status == "FINISHED"
        (disk / "someone_elses").unlink()
        again = logger()
        again.log_metrics({"loss": 0.5}, 2)
        assert not kept.exists()
        assert mlflow.artifacts.load_text(f"runs:/{ours.run_id}/report.md") == "a report " * 9000


def test_a_run_that_mlflow_does_not_know_is_one_line(logger: Callable[[], RunLogger], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef", "experiment_id": "1"}')
    with pytest.raises(RuntimeError, match=r"has no run 0123456789abcdef.* or remove .*/run/run\.json to log to a new run$"):
        logger().log_metrics({"loss": 1.0}, 1)


def test_a_call_that_is_wrong_is_an_error_and_waits_for_nothing(logger: Callable[[], RunLogger], tmp_path: Path) -> None:
    ours = logger()
    ours.log_hyperparams({"rate": 1})
    with pytest.raises(MlflowException, match="rate"):
        ours.log_hyperparams({"rate": 2})
    assert not (tmp_path / "run" / "unsent.jsonl").exists()


def test_no_server_to_begin_with_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{free.getsockname()[1]}"
    ours = RunLogger("x", folder=str(tmp_path), tracking_uri=uri)
    with pytest.raises(ConnectionError, match=r"^no MLflow at http://me:\*\*\*@127.0.0.1:\d+: .* or use logger=none$") as caught:
        ours.log_metrics({"loss": 1.0}, 1)
    assert "secret" not in str(caught.value)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server ended with status {process.returncode}")


@contextmanager
def server(store: str, artifacts: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server; it answers when this returns."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(artifacts.parent / "server.log", "ab") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it starts sooner
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(900)  # two starts of a server, which is seconds on an idle machine and minutes on a busy one
def test_a_server_that_goes_away_and_comes_back_misses_nothing(tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, folder = f"http://127.0.0.1:{port}", tmp_path / "run"

    def logger() -> RunLogger:
        return RunLogger(tmp_path.name, folder=str(folder), seconds_between_tries=0.2, tracking_uri=uri)

    def said() -> list[str]:
        return [record.message for record in caplog.records if record.name == "src.utils.run_logger"]

    kept = f"{folder}/unsent.jsonl and {folder}/unsent_files.jsonl"
    still_away = f"MLflow still does not answer: what it was not sent is in {kept}, and goes with the next ckpt_path=last"
    first = logger()
    with server(tracking_uri, tmp_path / "artifacts", port):
        for step in (1, 2):
            first.log_metrics({"loss": float(step)}, step)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        for step in (3, 4, 5):
            first.log_metrics({"loss": float(step)}, step)
            time.sleep(0.15)  # a try in between finds it still away
        first.log_table({"step": [5], "text": ["a"]}, "rationales/step_5.json")
        first.log_text("a report", "report.md")
        first.log_figure(Figure(), "figures/empty.png")
        assert time.monotonic() - began < 60
        first.finalize("failed")  # the process ends; what it could not send is on the disk
        assert [line.partition(" (")[0] for line in said()] == [f"MLflow at {uri} does not answer", still_away]  # said once, and at the end
    assert "training goes on" in said()[0]
    second = logger()  # goes on from a checkpoint of step 3, and the server is still away
    second.log_metrics({"loss": 4.0}, 4)
    with server(tracking_uri, tmp_path / "artifacts", port):
        time.sleep(0.2)
        for step in (5, 6):
            second.log_metrics({"loss": float(step)}, step)
        second.finalize("success")
        client, run_id = second.experiment, str(second.run_id)
        assert run_id == first.run_id
        assert steps(client, run_id, "loss") == [1, 2, 3, 4, 5, 6]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert mlflow.artifacts.load_text(f"runs:/{run_id}/report.md") == "a report"
        assert mlflow.artifacts.load_dict(f"runs:/{run_id}/rationales/step_5.json")["data"] == [[5, "a"]]
        assert [file.path for file in client.list_artifacts(run_id, "figures")] == ["figures/empty.png"]
    assert any("entries that waited were sent" in line for line in said())
    assert not (folder / "unsent.jsonl").exists()
