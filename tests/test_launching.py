"""Runs of two processes as users start them: by Lightning, which starts the second itself, and by SLURM's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT
from tests.runs import TINY, mlflow_runs, steps, stop_at

SMALL = [*TINY, "module.num_generations=2", "trainer.limit_train_batches=2", "algorithm.truncation=none"]

SRUN = """#!/bin/bash
# SLURM's srun on one machine: one process a task, with the variables that tell it its place.
while [[ $1 == -* ]]; do shift; done
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[$task]=$!
done
for task in 0 1; do wait "${tasks[$task]}"; ended=$?; status=$((ended > status ? ended : status)); done
exit $status
"""


def assert_traces_of_one_rank(folder: Path, tracking_uri: str) -> None:
    """One log, one checkpoint folder, and one MLflow run with every step once."""
    out = folder / "out"
    assert (out / "checkpoints" / "last.ckpt").exists()
    assert [file.name for file in out.glob("*.log")] == ["train.log"]
    assert (out / "train.log").read_text().count("rollout batch 2/2") == 1
    client = MlflowClient(tracking_uri)
    (run,) = mlflow_runs(client, folder.name)
    assert run.info.status == "FINISHED"
    assert steps(client, run) == [1, 2]


@pytest.mark.slow
def test_lightning_starts_the_second_process(places, tracking_uri, tmp_path):
    command = [sys.executable, "train.py", "trainer=cpu_ddp", *SMALL, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_traces_of_one_rank(tmp_path, tracking_uri)


@pytest.mark.slow
def test_signal_to_the_first_process_stops_both(places, tmp_path):
    own = ["trainer.limit_train_batches=20", "logger=none", "callbacks.progress.seconds_between_lines=0"]
    code, shown = stop_at("rollout batch 2/20", [sys.executable, "train.py", "trainer=cpu_ddp", *SMALL, *places, *own])
    assert code == 75, shown[-3000:]
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()


def sbatch(folder: Path, settings: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the script as SLURM would on one machine for two tasks."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": f'#!/bin/bash\necho "$@" >> {folder}/scontrol.txt\n'}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "grace", "NNODES": "1", "NODEID": "0", "NODELIST": "127.0.0.1"}
    slurm |= {"NTASKS": "2", "NTASKS_PER_NODE": "2"}
    own = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    own |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), **environment}
    script = ROOT / "cluster" / "train.sbatch"
    return subprocess.run(["bash", script, *settings], cwd=ROOT, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (75, "requeue 7\n")])
def test_slurm_script_requeues_after_75_only(status, requeued, tmp_path):
    python, commands = tmp_path / "python", tmp_path / "commands.txt"
    python.write_text(f'#!/bin/bash\necho "$@" >> {commands}\nexit {status}\n')
    python.chmod(0o755)
    (tmp_path / "scontrol.txt").touch()
    assert sbatch(tmp_path, ["seed=1"], PYTHON=str(python)).returncode == status
    assert (tmp_path / "scontrol.txt").read_text() == requeued
    assert "hydra.run.dir=${paths.output_root}/${name}/slurm_7 seed=1\n" in commands.read_text()
    commands.unlink()
    sbatch(tmp_path, ["ckpt_path=last", "seed=1"], PYTHON=str(python))
    assert "hydra.run.dir" not in commands.read_text()  # that run has a folder


@pytest.mark.slow
def test_slurm_script_trains_with_slurm_s_ranks(places, tracking_uri, tmp_path):
    done = sbatch(tmp_path, ["trainer.accelerator=cpu", *SMALL, *places])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_traces_of_one_rank(tmp_path, tracking_uri)


@pytest.mark.usefixtures("compose")
def test_slurm_launcher_has_task_per_device():
    overrides = ["hydra/launcher=slurm", "trainer=fsdp", "trainer.devices=4", "trainer.num_nodes=2"]
    launcher = hydra_compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 4, 4)
    assert launcher._target_.endswith("SlurmLauncher")


def test_sweep_of_process_starters_is_refused(programs, tmp_path):
    settings = ["trainer=cpu_ddp", "seed=0,1", "logger=none", "callbacks=minimal", f"hydra.sweep.dir={tmp_path}"]
    done = programs.run("train.py", "-m", *settings)
    assert done.returncode != 0
    assert "2 processes needs a launcher that starts them: use hydra/launcher=slurm" in done.stderr
