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
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, Compose
from tests.programs import Programs
from train import train

RunTrain = Callable[..., "subprocess.CompletedProcess[str]"]
"""(*overrides) -> what `python train.py` with them came to."""


@pytest.fixture
def run_train(programs: Programs) -> RunTrain:
    environment = {key: value for key, value in os.environ.items() if key != "PROJECT_ROOT"}
    return functools.partial(programs.run, "train.py", env=environment)


@pytest.fixture
def places(tracking_uri: str, tiny_policy_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=tiny_sup",
        f"policy.path={tiny_policy_folder}",
        f"hydra.run.dir={tmp_path}/out",
        f"paths.cache_dir={tmp_path}/cache",
        f"paths.tracking_uri={tracking_uri}",
        f"paths.artifact_location=file://{tmp_path}/artifacts",
        f"project={tmp_path.name}",
        # few and small packages: the point is the way, not the data
        "packages.train=[urllib3]",
        "packages.validation=[rich]",
        "packages.test=[networkx]",
    ]


def test_train_end_to_end(run_train: RunTrain, places: list[str], tracking_uri: str, tmp_path: Path) -> None:
    done = run_train("debug=fast", "seed=7", *places)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in ("Base + reasoning", "GRACE", "Rationales", f"{tmp_path}/out/report.md", "rollout batch 2/2"):
        assert expected in done.stdout, done.stdout[-3000:]
    for file in (
        "report.html",
        "report.md",
        "similarities.png",
        "rationales.md",
        "reward_terms.png",
        "test_scores.png",
        "export/grace.json",
        "checkpoints/last.ckpt",
    ):
        assert (tmp_path / "out" / file).exists(), file

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "7"
    assert run.data.params["reward._target_"] == "src.modules.objectives.rewards.document"
    assert {"git.commit", "version.lightning", "hardware.cores"} <= set(run.data.tags)
    for metric in ("reward/total/mean", "reward/hard/within_group_std", "kl/from_start", "throughput/rollout_tokens_per_second"):
        assert [entry.step for entry in client.get_metric_history(run.info.run_id, metric)] == [1, 2], metric
    assert {"mteb/average", "test/base/average", "test/base_reasoning/average", "test/grace/DocstringRetrieval"} <= set(run.data.metrics)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "figures", "rationales", "report", "report.html", "report.md", "similarities"} <= artifacts
    config = yaml.safe_load((tmp_path / "artifacts" / run.info.run_id / "artifacts" / "config.yaml").read_text())
    assert config["paths"]["output_dir"] == f"{tmp_path}/out"


def test_a_run_told_to_stop_goes_on_in_its_own_folder_and_mlflow_run(
    run_train: RunTrain, places: list[str], tracking_uri: str, tmp_path: Path
) -> None:
    own = [place for place in places if not place.startswith("hydra.run.dir")]
    settings = [*own, f"paths.output_root={tmp_path}/outputs", "callbacks=minimal", "trainer.limit_train_batches=4"]
    settings += ["rollout.max_new_tokens=4", "module.num_generations=2", "datamodule.modules_per_batch=2"]
    command = [sys.executable, "train.py", *settings]  # as users start it
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if "rollout batch 1/4" in line:
                process.send_signal(signal.SIGUSR1)
    assert process.returncode == 75, shown[-3000:]
    assert "stopped by a signal, after saving a checkpoint; exit status 75" in shown
    again = run_train(*settings, "ckpt_path=last")
    assert again.returncode == 0, again.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "tiny_sup").iterdir()
    assert "rollout batch 1/4" in (folder / "train.log").read_text()
    assert "rollout batch 4/4" in (folder / "train.log").read_text()
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "reward/total/mean")] == [1, 2, 3, 4]
    traces = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.lock"}
    refused = run_train(*settings, f"hydra.run.dir={folder}", "reward=paper")
    assert refused.returncode == 1
    assert f"{folder} holds a run already: go on with it by ckpt_path=last" in refused.stderr
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.lock"} == traces
    nothing = run_train(*settings, "ckpt_path=last", "seed=1")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith(f"train.py: ckpt_path=last: no run with seed=1 was begun in {tmp_path}/outputs/tiny_sup; of another")
    assert "\n" not in nothing.stderr.rstrip()


@pytest.mark.slow
def test_a_sweep_over_training_is_grouped_and_goes_on(run_train: RunTrain, places: list[str], tracking_uri: str, tmp_path: Path) -> None:
    small = ["callbacks=minimal", "trainer.limit_train_batches=1", "rollout.max_new_tokens=4", "optimized_metric=reward/total/mean"]
    grid = ["-m", "reward=paper", "reward.consistency_weight=0,0.2", "module.num_generations=1,2"]
    places = [place for place in places if not place.startswith("hydra.run.dir")] + [f"paths.output_root={tmp_path}"]
    done = run_train(*grid, *small, *places)  # a group of one is refused
    assert done.returncode == 1
    assert "sweep: 2 of 4 points failed" in done.stderr
    assert "  consistency_weight=0, num_generations=1: InstantiationException:" in done.stderr
    assert "module.num_generations=1: a group of one rollout has no baseline" in done.stderr
    again = run_train(*grid, *small, *places)
    assert again.stdout.count("finished before, not repeated") == 2
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "sweep.id" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == 6
    assert sorted(run.info.status for run in children) == ["FAILED"] * 4 + ["FINISHED"] * 2
    best = max((run for run in children if run.info.status == "FINISHED"), key=lambda run: run.data.metrics["reward/total/mean"])
    assert parent.data.tags["sweep.best"] == best.info.run_name


@pytest.mark.slow
def test_a_sweep_gives_every_run_a_folder_of_its_own(run_train: RunTrain, places: list[str], tmp_path: Path) -> None:
    small = ["callbacks=minimal", "logger=none", "trainer.limit_train_batches=1", "rollout.max_new_tokens=4"]
    grid = ["hparams_search=lambdas", "reward.consistency_weight=0.2", "reward.hard_weight=0.0,0.2", "seed=0"]
    grid += ["optimized_metric=reward/total/mean"]
    done = run_train(*grid, *small, *places, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    for job in ("0", "1"):
        assert (tmp_path / "sweep" / job / "reward_terms.png").exists()
        assert (tmp_path / "sweep" / job / "checkpoints" / "last.ckpt").exists()


def test_the_optimised_metric_is_returned(compose: Compose) -> None:
    settings = ["logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1"]
    settings += ["rollout.max_new_tokens=4", "packages.train=[urllib3]", "reward=listwise"]
    reward = train(compose(*settings, "optimized_metric=reward/total/mean"))
    assert reward is not None
    assert reward < 0  # of the listwise form, a sum of log-probabilities
    with pytest.raises(KeyError, match=r"optimized_metric='nope' was never logged; there are: .*reward/total/mean"):
        train(compose(*settings, "optimized_metric=nope"))


def test_without_a_checkpoint_callback_nothing_is_saved(compose: Compose, tmp_path: Path) -> None:
    settings = ["logger=none", "callbacks=minimal", "callbacks.checkpoint=null", "trainer.accelerator=cpu", "trainer.limit_train_batches=1"]
    train(compose(*settings, "rollout.max_new_tokens=4", "packages.train=[urllib3]", "optimized_metric=reward/total/mean"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_missing_policy_is_one_clear_line(compose: Compose) -> None:
    cfg = compose("logger=none", "callbacks=minimal", "trainer.accelerator=cpu")
    cfg.policy.path = "/no/such/folder"
    with pytest.raises(InstantiationException, match="no policy at '/no/such/folder'"):
        train(cfg)
