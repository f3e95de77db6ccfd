"""Sweeps as a user starts them, over arithmetic in the place of training (sweep_app.py): real processes, launchers, stores, signals."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from src.utils.sweeps import TrackedSweep, fingerprint, parse, short, warn_of_other_code
from tests.conftest import ROOT, Compose
from tests.programs import Programs

GRID = ["reward.consistency_weight=0,0.2", "reward.hard_weight=0,0.1"]


@dataclass
class Sweeper:
    """Starts sweeps of the app in a project of their own."""

    programs: Programs
    folder: Path
    tracking_uri: str

    def __call__(self, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        places = [
            f"paths.tracking_uri={self.tracking_uri}",
            f"paths.artifact_location=file://{self.folder}/artifacts",
            f"paths.output_root={self.folder}/outputs",
            f"project={self.folder.name}",
        ]
        command = ["-m", "tests.utils.sweep_app", "-m", "experiment=tiny_sup", "reward=paper", *overrides, *places]
        env = os.environ | {"RAN": str(self.folder / "ran"), "MLFLOW_DISABLE_TELEMETRY": "true"} | environment
        if any(override.startswith("hydra/launcher=") for override in overrides):  # starts processes that look at how this one was started
            return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        return self.programs.run(*command, env=env)

    @property
    def ran(self) -> list[str]:
        """The points that were computed, in their order."""
        file = self.folder / "ran"
        return file.read_text().splitlines() if file.exists() else []

    def runs(self) -> tuple[Run, list[Run]]:
        """The one parent, and its children from the oldest to the newest."""
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name(self.folder.name)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        return parent, children

    def artifacts(self) -> set[str]:
        parent, _ = self.runs()
        return {file.path for file in MlflowClient(self.tracking_uri).list_artifacts(parent.info.run_id)}


@pytest.fixture
def sweep(programs: Programs, tmp_path: Path, tracking_uri: str) -> Sweeper:
    return Sweeper(programs, tmp_path, tracking_uri)


def states(runs: list[Run]) -> list[tuple[str, str]]:
    return [(short(json.loads(run.data.tags["sweep.values"])), run.info.status) for run in runs]


def test_a_sweep_outlives_sigkill_and_a_failed_point_and_repeats_nothing(sweep: Sweeper) -> None:
    killed = sweep(*GRID, FAIL_AT="0 0 0", KILL_AT="0.2 0 0")
    assert killed.returncode == -signal.SIGKILL
    assert sweep.ran == ["0 0.1 0"]

    rerun = sweep(*GRID, FAIL_EARLY="0 0 0")
    assert rerun.returncode == 1
    assert sweep.ran == ["0 0.1 0", "0.2 0 0", "0.2 0.1 0"]
    last_words = "sweep: 1 of 4 points failed; the same command tries these again, and no others:\n"
    assert last_words + "  consistency_weight=0, hard_weight=0: ValueError: failed before there was a run" in rerun.stderr
    parent, children = sweep.runs()
    assert parent.info.status == "FAILED"
    assert states(children) == [
        ("consistency_weight=0, hard_weight=0", "FAILED"),
        ("consistency_weight=0, hard_weight=0.1", "FINISHED"),
        ("consistency_weight=0.2, hard_weight=0", "KILLED"),
        ("consistency_weight=0, hard_weight=0", "FAILED"),
        ("consistency_weight=0.2, hard_weight=0", "FINISHED"),
        ("consistency_weight=0.2, hard_weight=0.1", "FINISHED"),
    ]
    where = f"finished before, not repeated: MLflow run {children[1].info.run_id}, {sweep.folder}/outputs/multirun/"
    assert where in rerun.stdout

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
def test_an_optuna_search_goes_on_with_the_points_that_it_would_have_had(sweep: Sweeper) -> None:
    pytest.importorskip("optuna")
    space = ["hydra/sweeper=optuna", "optimized_metric=mteb/average", "reward.consistency_weight=interval(0.0,0.5)"]
    space += ["reward.hard_weight=choice(0.0,0.1)"]
    first = sweep(*space, "hydra.sweeper.n_trials=2")
    assert first.returncode == 0, first.stderr[-2000:]
    assert len(sweep.ran) == 2
    failing, _ = sweep.ran
    more = sweep(*space, "hydra.sweeper.n_trials=4", FAIL_AT=failing)  # it would fail, were it run again
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
def test_other_launchers_group_and_resume_alike(launcher: str, settings: list[str], sweep: Sweeper) -> None:
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


def test_without_tracking_nothing_is_grouped(compose: Compose) -> None:
    cfg = compose("logger=none")
    TrackedSweep().on_multirun_start(cfg)
    assert cfg.sweep_run is None


def test_a_store_that_cannot_be_opened_ends_the_sweep_in_a_line(compose: Compose) -> None:
    cfg = compose()
    cfg.paths.tracking_uri = "nosuch://me:secret@host"
    with pytest.raises(SystemExit, match=r"^sweep: no parent run at nosuch://me:\*\*\*@host: "):
        TrackedSweep().on_multirun_start(cfg)


def test_a_misspelt_direction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hydra.callbacks.sweep.direction='max': it is maximize or minimize"):
        TrackedSweep(direction="max")


def test_a_point_is_known_by_its_config_and_not_by_how_it_was_written(compose: Compose) -> None:
    point = fingerprint(compose("reward=paper", "reward.hard_weight=0.2"))
    assert point == fingerprint(compose("reward=paper", "reward.hard_weight=0.20", "paths.tracking_uri=sqlite:///elsewhere.db"))
    assert point == fingerprint(compose("reward=paper"))  # its default
    assert point != fingerprint(compose("reward=paper", "reward.hard_weight=0.3"))
    assert point != fingerprint(compose("reward=paper", "seed=1"))


def test_values_are_written_short() -> None:
    assert parse(["a.b=1", "a.b=2", "reward=paper,document"])["a.b"].value() == 2
    assert (
        short({"reward.hard_weight": "0.123456789", "seed": "1", "policy": "pretrained"}) == "hard_weight=0.1235, seed=1, policy=pretrained"
    )


def test_a_point_of_other_code_is_not_passed_over_in_silence(tracking_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    client = MlflowClient(tracking_uri)
    run = client.create_run(client.create_experiment("other code"), tags={"git.commit": "a" * 40})
    warn_of_other_code(run, "a" * 40)
    assert not caplog.records
    warn_of_other_code(run, "b" * 40)
    assert "that was commit aaaaaaaaaa, this is bbbbbbbbbb: delete the run in MLflow" in caplog.text
