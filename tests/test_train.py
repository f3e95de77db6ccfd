"""train.py as a user runs it, and what it leaves in MLflow."""

import sys

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from src.modules.policy.model import Policy
from tests.runs import TINY, mlflow_runs, steps, stop_at
from train import train

ONE_BATCH = [*TINY, "trainer.limit_train_batches=1"]


def test_train_end_to_end(run_train, places, tracking_uri, tmp_path):
    done = run_train("debug=fast", "seed=7", *places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "outputs" / "runs_elsewhere.txt").read_text() == f"{tmp_path}/out\n"  # where evaluate.py looks
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
    each_batch = ["reward/positive/mean", "reward/hard/within_group_std", "update/entropy", "kl/from_start"]
    each_batch += ["throughput/rollout_tokens_per_second", "seconds/batch", "memory/peak_rss_gib"]
    for metric in each_batch:
        assert steps(client, run, metric) == [1, 2], metric
    assert {"mteb/average", "test/base/average", "test/base_reasoning/average", "test/grace/DocstringRetrieval"} <= set(run.data.metrics)
    assert {"DocstringRetrieval", "docstrings"} <= {found.dataset.name for found in run.inputs.dataset_inputs}
    (export,) = client.search_logged_models([run.info.experiment_id], "name LIKE '%export'")
    assert (export.tags["path"], export.source_run_id) == (f"{tmp_path}/out/export", run.info.run_id)
    assert {"mteb/average", "test/grace/average"} <= {point.key for point in export.metrics}
    assert run.data.tags["mlflow.note.content"].startswith("GRACE of `")
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert "figures/reward_terms.png" in {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
    assert {"config.yaml", "figures", "rationales", "report", "report.html", "report.md", "similarities"} <= artifacts
    config = yaml.safe_load((tmp_path / "artifacts" / run.info.run_id / "artifacts" / "config.yaml").read_text())
    assert config["paths"]["output_dir"] == run.data.params["paths.output_dir"] == f"{tmp_path}/out"


def test_second_stage_begins_with_the_export_of_the_first(compose):
    small = ["logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1", "trainer.precision=32-true"]
    small += ["datamodule.modules_per_batch=2", "rollout.max_new_tokens=6", "module.num_generations=2"]
    first = compose("experiment=smollm2_two_stages_start", *small)
    first.callbacks.export = {"_target_": "src.callbacks.export.Export", "folder": f"{first.paths.output_dir}/export"}
    second = compose("experiment=smollm2_two_stages", *small)
    start, second.policy.path = first.policy.path, first.callbacks.export.folder
    for cfg in (first, second):
        cfg.packages.train, cfg.optimized_metric = ["urllib3"], "update/kl_to_reference"
        assert abs(train(cfg)) < 1e-4  # each is held to what it begins with
    before, exported = (Policy.load(path).state_dict() for path in (start, second.policy.path))
    assert any(not torch.equal(weight, before[name]) for name, weight in exported.items())


def test_stopped_run_resumes_in_place(run_train, places, tracking_uri, tmp_path):
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
    assert steps(client, run) == [1, 2, 3, 4]

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
    done = run_train(*command, f"hydra.sweep.dir={tmp_path}/sweep")  # a group of one is refused
    assert done.returncode == 1
    assert "sweep: 2 of 4 points failed" in done.stderr
    assert "  consistency_weight=0, num_generations=1: InstantiationException:" in done.stderr
    assert "module.num_generations=1: a group of one" in done.stderr
    for point in ("1", "3"):  # of a group of two
        for file in ("reward_terms.png", "checkpoints/last.ckpt"):
            assert (tmp_path / "sweep" / point / file).exists()
    assert run_train(*command).stdout.count("finished before, not repeated") == 2
    runs = mlflow_runs(MlflowClient(tracking_uri), tmp_path.name)
    (parent,) = [run for run in runs if "sweep.id" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == 6
    assert sorted(run.info.status for run in children) == ["FAILED"] * 4 + ["FINISHED"] * 2
    best = max((run for run in children if run.info.status == "FINISHED"), key=lambda run: run.data.metrics["reward/total/mean"])
    assert parent.data.tags["sweep.best"] == best.info.run_name


def test_optimized_metric_is_returned(compose, tmp_path):
    settings = ["logger=none", *ONE_BATCH, "trainer.accelerator=cpu", "packages.train=[urllib3]", "reward=listwise"]
    reward = train(compose(*settings, "optimized_metric=reward/total/mean", "callbacks.checkpoint=null"))
    assert reward < 0  # of the listwise form, a sum of log-probabilities
    assert not list(tmp_path.rglob("*.ckpt"))  # nor does Lightning save one
    with pytest.raises(KeyError, match=r"optimized_metric='nope' was never logged.*reward/total/mean"):
        train(compose(*settings, "optimized_metric=nope"))


def test_missing_policy_is_one_line(compose):
    cfg = compose("logger=none", "callbacks=minimal", "trainer.accelerator=cpu")
    cfg.policy.path = "/no/such/folder"
    with pytest.raises(SystemExit, match=r"^train\.py: no policy at '/no/such/folder'"):
        train(cfg)
