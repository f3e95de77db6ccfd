"""train.py as a user runs it, and what it leaves in MLflow."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.errors import InstantiationException
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT
from tests.programs import Programs
from train import train

RunTrain = Callable[..., "subprocess.CompletedProcess[str]"]
"""(*overrides) -> result of `python train.py` with them."""

TINY = ["callbacks=minimal", "rollout.max_new_tokens=4"]
ONE_BATCH = [*TINY, "trainer.limit_train_batches=1"]


@pytest.fixture
def run_train(programs: Programs) -> RunTrain:
    environment = {key: value for key, value in os.environ.items() if key != "PROJECT_ROOT"}
    return functools.partial(programs.run, "train.py", env=environment)


@pytest.fixture
def places(tracking_uri: str, tiny_policy_folder: Path, tmp_path: Path) -> list[str]:
    """A tiny policy, few and small packages, and everything written below `tmp_path`."""
    return [
        *("experiment=tiny_sup", f"policy.path={tiny_policy_folder}", f"project={tmp_path.name}"),
        *(f"hydra.run.dir={tmp_path}/out", f"paths.output_root={tmp_path}/outputs", f"paths.cache_dir={tmp_path}/cache"),
        *(f"paths.tracking_uri={tracking_uri}", f"paths.artifact_location=file://{tmp_path}/artifacts"),
        *("packages.train=[urllib3]", "packages.validation=[rich]", "packages.test=[networkx]"),
    ]


def mlflow_runs(client: MlflowClient, project: str) -> list[Run]:
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def reward_steps(client: MlflowClient, run: Run) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, "reward/total/mean")]


def stop_at(line: str, command: list[str]) -> tuple[int, str]:
    """Starts a command as users do and sends it SIGUSR1 when it says a line; returns its exit status and output."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        shown = ""
        for said in process.stdout:
            shown += said
            if line in said:
                process.send_signal(signal.SIGUSR1)
    return process.returncode, shown


def test_train_end_to_end(run_train, places, tracking_uri, tmp_path):
    done = run_train("debug=fast", "seed=7", *places)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in ("Base + reasoning", "GRACE", "Rationales", f"{tmp_path}/out/report.md", "rollout batch 2/2"):
        assert expected in done.stdout, done.stdout[-3000:]
    files = ["report.html", "report.md", "similarities.png", "rationales.md", "reward_terms.png", "test_scores.png"]
    for file in [*files, "export/grace.json", "checkpoints/last.ckpt"]:
        assert (tmp_path / "out" / file).exists(), file

    client = MlflowClient(tracking_uri)
    (run,) = mlflow_runs(client, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert (run.data.params["seed"], run.data.params["reward._target_"]) == ("7", "src.modules.objectives.rewards.document")
    assert {"git.commit", "version.lightning", "hardware.cores"} <= set(run.data.tags)
    for metric in ("reward/total/mean", "reward/hard/within_group_std", "kl/from_start", "throughput/rollout_tokens_per_second"):
        assert [entry.step for entry in client.get_metric_history(run.info.run_id, metric)] == [1, 2], metric
    assert {"mteb/average", "test/base/average", "test/base_reasoning/average", "test/grace/DocstringRetrieval"} <= set(run.data.metrics)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "figures", "rationales", "report", "report.html", "report.md", "similarities"} <= artifacts
    config = yaml.safe_load((tmp_path / "artifacts" / run.info.run_id / "artifacts" / "config.yaml").read_text())
    assert config["paths"]["output_dir"] == f"{tmp_path}/out"


def test_stopped_run_resumes_in_its_folder_and_mlflow_run(run_train, places, tracking_uri, tmp_path):
    settings = [place for place in places if not place.startswith("hydra.run.dir")]
    settings += [*TINY, "trainer.limit_train_batches=4", "module.num_generations=2", "datamodule.modules_per_batch=2"]
    code, shown = stop_at("rollout batch 1/4", [sys.executable, "train.py", *settings])
    assert code == 75, shown[-3000:]
    assert "exit status 75" in shown
    again = run_train(*settings, "ckpt_path=last")
    assert again.returncode == 0, again.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "tiny_sup").iterdir()
    assert "rollout batch 1/4" in (folder / "train.log").read_text()
    assert "rollout batch 4/4" in (folder / "train.log").read_text()
    client = MlflowClient(tracking_uri)
    (run,) = mlflow_runs(client, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert reward_steps(client, run) == [1, 2, 3, 4]

    def traces():
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.lock"}

    before = traces()
    refused = run_train(*settings, f"hydra.run.dir={folder}", "reward=paper")
    assert refused.returncode == 1
    assert f"{folder} holds a run already" in refused.stderr
    assert traces() == before
    nothing = run_train(*settings, "ckpt_path=last", "seed=1")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("train.py: ckpt_path=last: no run with seed=1")
    assert "\n" not in nothing.stderr.rstrip()


@pytest.mark.slow
def test_sweep_over_training_resumes(run_train, places, tracking_uri, tmp_path):
    grid = ["-m", "reward=paper", "reward.consistency_weight=0,0.2", "module.num_generations=1,2"]
    command = [*grid, *ONE_BATCH, "optimized_metric=reward/total/mean", *places]
    done = run_train(*command)  # a group of one is refused
    assert done.returncode == 1
    assert "sweep: 2 of 4 points failed" in done.stderr
    assert "  consistency_weight=0, num_generations=1: InstantiationException:" in done.stderr
    assert "module.num_generations=1: a group of one" in done.stderr
    assert run_train(*command).stdout.count("finished before, not repeated") == 2
    runs = mlflow_runs(MlflowClient(tracking_uri), tmp_path.name)
    (parent,) = [run for run in runs if "sweep.id" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == 6
    assert sorted(run.info.status for run in children) == ["FAILED"] * 4 + ["FINISHED"] * 2
    best = max((run for run in children if run.info.status == "FINISHED"), key=lambda run: run.data.metrics["reward/total/mean"])
    assert parent.data.tags["sweep.best"] == best.info.run_name


@pytest.mark.slow
def test_every_point_of_a_sweep_has_its_folder(run_train, places, tmp_path):
    grid = ["hparams_search=lambdas", "reward.consistency_weight=0.2", "reward.hard_weight=0.0,0.2", "seed=0"]
    metric = "optimized_metric=reward/total/mean"
    done = run_train(*grid, metric, *ONE_BATCH, "logger=none", *places, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    for job in ("0", "1"):
        assert (tmp_path / "sweep" / job / "reward_terms.png").exists()
        assert (tmp_path / "sweep" / job / "checkpoints" / "last.ckpt").exists()


def test_optimized_metric_is_returned(compose, tmp_path):
    settings = ["logger=none", *ONE_BATCH, "trainer.accelerator=cpu", "packages.train=[urllib3]", "reward=listwise"]
    reward = train(compose(*settings, "optimized_metric=reward/total/mean", "callbacks.checkpoint=null"))
    assert reward is not None
    assert reward < 0  # of the listwise form, a sum of log-probabilities
    assert not list(tmp_path.rglob("*.ckpt"))  # nor does Lightning save one
    with pytest.raises(KeyError, match=r"optimized_metric='nope' was never logged.*reward/total/mean"):
        train(compose(*settings, "optimized_metric=nope"))


def test_missing_policy_is_one_line(compose):
    cfg = compose("logger=none", "callbacks=minimal", "trainer.accelerator=cpu")
    cfg.policy.path = "/no/such/folder"
    with pytest.raises(InstantiationException, match="no policy at '/no/such/folder'"):
        train(cfg)
