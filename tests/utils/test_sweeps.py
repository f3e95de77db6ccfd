"""Sweeps as a user starts them, with arithmetic in place of training (sweep_app.py): real processes, launchers, stores, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from src.utils.sweeps import TrackedSweep, fingerprint, parse, short, warn_of_other_code
from tests.conftest import ROOT
from tests.programs import Programs
from tests.runs import mlflow_runs

GRID = ["reward.consistency_weight=0,0.2", "reward.hard_weight=0,0.1"]


class Sweeper:
    """Starts sweeps of the app in a project of their own."""

    def __init__(self, programs: Programs, folder: Path, tracking_uri: str) -> None:
        self.programs, self.folder, self.client = programs, folder, MlflowClient(tracking_uri)
        self.places = [f"paths.tracking_uri={tracking_uri}", f"paths.artifact_location=file://{folder}/artifacts"]
        self.places += [f"paths.output_root={folder}/outputs", f"project={folder.name}"]

    def __call__(self, *overrides: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = ["-m", "tests.utils.sweep_app", "-m", "experiment=tiny_sup", "reward=paper", *overrides, *self.places]
        env = os.environ | {"RAN": str(self.folder / "ran"), "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
        if any(override.startswith("hydra/launcher=") for override in overrides):  # workers look at how this process was started
            return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        return self.programs.run(*command, env=env)

    @property
    def ran(self) -> list[str]:
        """The points that were computed, in order."""
        file = self.folder / "ran"
        return file.read_text().splitlines() if file.exists() else []

    def runs(self) -> tuple[Run, list[Run]]:
        """The one parent, and its children from the oldest to the newest."""
        runs = mlflow_runs(self.client, self.folder.name)[::-1]
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        return parent, children

    def artifacts(self) -> set[str]:
        return {file.path for file in self.client.list_artifacts(self.runs()[0].info.run_id)}


@pytest.fixture
def sweep(programs: Programs, tmp_path: Path, tracking_uri: str) -> Sweeper:
    return Sweeper(programs, tmp_path, tracking_uri)


def test_sweep_resumes_after_sigkill_and_failures(sweep):
    killed = sweep(*GRID, FAIL_AT="0 0 0", KILL_AT="0.2 0 0")
    assert killed.returncode == -signal.SIGKILL
    assert sweep.ran == ["0 0.1 0"]

    rerun = sweep(*GRID, FAIL_EARLY="0 0 0")
    assert rerun.returncode == 1
    assert sweep.ran == ["0 0.1 0", "0.2 0 0", "0.2 0.1 0"]
    assert "sweep: 1 of 4 points failed" in rerun.stderr
    assert "  consistency_weight=0, hard_weight=0: ValueError: failed before there was a run" in rerun.stderr
    parent, children = sweep.runs()
    assert parent.info.status == "FAILED"
    states = [(short(json.loads(run.data.tags["sweep.values"])), run.info.status) for run in children]
    assert states == [
        ("consistency_weight=0, hard_weight=0", "FAILED"),
        ("consistency_weight=0, hard_weight=0.1", "FINISHED"),
        ("consistency_weight=0.2, hard_weight=0", "KILLED"),
        ("consistency_weight=0, hard_weight=0", "FAILED"),
        ("consistency_weight=0.2, hard_weight=0", "FINISHED"),
        ("consistency_weight=0.2, hard_weight=0.1", "FINISHED"),
    ]
    assert f"not repeated: MLflow run {children[1].info.run_id}, {sweep.folder}/outputs/multirun/" in rerun.stdout

    last = sweep(*GRID)
    assert last.returncode == 0, last.stderr[-2000:]
    assert sweep.ran[3:] == ["0 0 0"]
    parent, children = sweep.runs()
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name.startswith("sweep experiment=tiny_sup reward=paper reward.consistency_weight=0,0.2")
    assert len(children) == 7
    assert parent.data.tags["sweep.best"] == "consistency_weight=0.2, hard_weight=0.1"
    assert parent.data.metrics["best/mteb/average"] == 1
    assert sweep.artifacts() == {"sweep.yaml", "sweep.md", "sweep.png"}


@pytest.mark.slow
def test_optuna_search_resumes(sweep):
    pytest.importorskip("optuna")
    space = ["hydra/sweeper=optuna", "optimized_metric=mteb/average", "reward.consistency_weight=interval(0.0,0.5)"]
    space += ["reward.hard_weight=choice(0.0,0.1)"]
    first = sweep(*space, "hydra.sweeper.n_trials=2")
    assert first.returncode == 0, first.stderr[-2000:]
    assert len(sweep.ran) == 2
    failing, _ = sweep.ran
    more = sweep(*space, "hydra.sweeper.n_trials=4", FAIL_AT=failing)  # fails if it runs again
    assert more.returncode == 0, more.stderr[-2000:]
    assert more.stdout.count("finished before, not repeated") == 2
    assert len(set(sweep.ran)) == len(sweep.ran) == 4
    assert all(0 <= float(point.split()[0]) <= 0.5 for point in sweep.ran)
    parent, children = sweep.runs()
    best = max(children, key=lambda run: run.data.metrics["mteb/average"])
    assert parent.data.tags["sweep.best"] == short(json.loads(best.data.tags["sweep.values"]))
    assert "sweep.png" in sweep.artifacts()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "settings"), [("joblib", ["hydra.launcher.n_jobs=2"]), ("submitit_local", [])])
def test_other_launchers_resume(launcher, settings, sweep):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    first = sweep(f"hydra/launcher={launcher}", *settings, *GRID, FAIL_AT="0 0.1 0")
    assert first.returncode == 1
    assert "1 of 4 points failed" in first.stderr
    assert sorted(sweep.ran) == ["0 0 0", "0.2 0 0", "0.2 0.1 0"]
    second = sweep(f"hydra/launcher={launcher}", *settings, *GRID)
    assert second.returncode == 0, second.stderr[-2000:]
    assert sweep.ran[3:] == ["0 0.1 0"]
    parent, children = sweep.runs()
    assert [run.info.status for run in children].count("FINISHED") == 4
    assert parent.data.tags["sweep.best"] == "consistency_weight=0.2, hard_weight=0.1"


def test_no_tracking_no_parent(compose):
    cfg = compose("logger=none")
    TrackedSweep().on_multirun_start(cfg)
    assert cfg.sweep_run is None


def test_unknown_store_ends_the_sweep(compose):
    cfg = compose()
    cfg.paths.tracking_uri = "nosuch://me:secret@host"
    with pytest.raises(SystemExit, match=r"^sweep: no parent run at nosuch://me:\*\*\*@host: "):
        TrackedSweep().on_multirun_start(cfg)


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"sweep.direction='max'"):
        TrackedSweep(direction="max")


def test_fingerprint_is_of_the_config(compose):
    point = fingerprint(compose("reward=paper", "reward.hard_weight=0.2"))
    assert point == fingerprint(compose("reward=paper", "reward.hard_weight=0.20", "paths.tracking_uri=sqlite:///elsewhere.db"))
    assert point == fingerprint(compose("reward=paper"))  # its default
    assert point != fingerprint(compose("reward=paper", "reward.hard_weight=0.3"))
    assert point != fingerprint(compose("reward=paper", "seed=1"))


def test_short_values():
    assert parse(["a.b=1", "a.b=2", "reward=paper,document"])["a.b"].value() == 2
    assert (
        short({"reward.hard_weight": "0.123456789", "seed": "1", "policy": "pretrained"}) == "hard_weight=0.1235, seed=1, policy=pretrained"
    )


def test_warning_of_other_code(tracking_uri, caplog):
    client = MlflowClient(tracking_uri)
    run = client.create_run(client.create_experiment("other code"), tags={"git.commit": "a" * 40})
    warn_of_other_code(run, "a" * 40)
    assert not caplog.records
    warn_of_other_code(run, "b" * 40)
    assert "that was commit aaaaaaaaaa, this is bbbbbbbbbb: delete the run in MLflow" in caplog.text
