"""Runs of two processes as users start them: by Lightning, which starts the second itself, and by SLURM's script."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT
from tests.programs import Programs

SMALL = [
    "callbacks=minimal",
    "rollout.max_new_tokens=4",
    "module.num_generations=2",
    "trainer.limit_train_batches=2",
    "algorithm.truncation=none",
]

SRUN = """#!/bin/bash
# What SLURM's srun does on one machine: one process a task, with the variables that tell it its place.
while [[ $1 == -* ]]; do shift; done
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[$task]=$!
done
for task in 0 1; do wait "${tasks[$task]}"; ended=$?; status=$((ended > status ? ended : status)); done
exit $status
"""


@pytest.fixture
def places(tracking_uri: str, tiny_policy_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=tiny_sup",
        f"policy.path={tiny_policy_folder}",
        f"paths.cache_dir={tmp_path}/cache",
        f"paths.tracking_uri={tracking_uri}",
        f"paths.artifact_location=file://{tmp_path}/artifacts",
        f"project={tmp_path.name}",
        "packages.train=[urllib3]",
    ]


def has_one_rank_s_traces(out: Path, tracking_uri: str, project: str) -> None:
    """One log, one checkpoint folder and one MLflow run with every step once."""
    assert (out / "checkpoints" / "last.ckpt").exists()
    assert [file.name for file in out.glob("*.log")] == ["train.log"]
    assert (out / "train.log").read_text().count("rollout batch 2/2") == 1
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "reward/total/mean")] == [1, 2]


@pytest.mark.slow
def test_lightning_starts_the_second_process_and_rank_zero_alone_leaves_traces(
    places: list[str], tracking_uri: str, tmp_path: Path
) -> None:
    command = [sys.executable, "train.py", "trainer=cpu_ddp", f"hydra.run.dir={tmp_path}/out", *SMALL, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    has_one_rank_s_traces(tmp_path / "out", tracking_uri, tmp_path.name)


@pytest.mark.slow
def test_a_signal_to_the_process_that_was_started_stops_both_and_is_the_command_s_status(places: list[str], tmp_path: Path) -> None:
    own = [f"hydra.run.dir={tmp_path}/out", "trainer.limit_train_batches=20", "logger=none", "callbacks.progress.seconds_between_lines=0"]
    command = [sys.executable, "train.py", "trainer=cpu_ddp", *SMALL, *places, *own]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if "rollout batch 2/20" in line:
                process.send_signal(signal.SIGUSR1)
    assert process.returncode == 75, shown[-3000:]
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()


def sbatch(folder: Path, settings: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as SLURM would run it on one machine for two tasks."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": f'#!/bin/bash\necho "$@" >> {folder}/scontrol.txt\n'}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    slurm = {
        "JOB_ID": "7",
        "JOB_NAME": "grace",
        "NNODES": "1",
        "NODEID": "0",
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "NODELIST": "127.0.0.1",
    }
    own = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    own |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), **environment}
    script = ROOT / "cluster" / "train.sbatch"
    return subprocess.run(["bash", script, *settings], cwd=ROOT, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (75, "requeue 7\n")])
def test_the_slurm_script_asks_for_another_start_after_75_alone(status: int, requeued: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/commands.txt\nexit {status}\n')
    python.chmod(0o755)
    (tmp_path / "scontrol.txt").touch()
    assert sbatch(tmp_path, ["seed=1"], PYTHON=str(python)).returncode == status
    assert (tmp_path / "scontrol.txt").read_text() == requeued
    assert "hydra.run.dir=${paths.output_root}/${name}/slurm_7 seed=1\n" in (tmp_path / "commands.txt").read_text()
    (tmp_path / "commands.txt").unlink()
    sbatch(tmp_path, ["ckpt_path=last", "seed=1"], PYTHON=str(python))
    assert "hydra.run.dir" not in (tmp_path / "commands.txt").read_text()  # that run has a folder


@pytest.mark.slow
def test_the_slurm_script_trains_with_the_ranks_that_slurm_gives(places: list[str], tracking_uri: str, tmp_path: Path) -> None:
    settings = ["trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/out", *SMALL, *places]
    done = sbatch(tmp_path, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    has_one_rank_s_traces(tmp_path / "out", tracking_uri, tmp_path.name)


@pytest.fixture
def configs() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.usefixtures("configs")
def test_a_sweep_by_slurm_asks_for_a_task_a_device() -> None:
    overrides = ["hydra/launcher=slurm", "trainer=fsdp", "trainer.devices=4", "trainer.num_nodes=2"]
    launcher = hydra_compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 4, 4)
    assert launcher._target_.endswith("SlurmLauncher")


def test_a_sweep_whose_runs_would_start_the_sweep_again_is_refused(programs: Programs, tmp_path: Path) -> None:
    settings = ["trainer=cpu_ddp", "seed=0,1", "logger=none", "callbacks=minimal", f"hydra.sweep.dir={tmp_path}"]
    done = programs.run("train.py", "-m", *settings)
    assert done.returncode != 0
    assert "a sweep (-m) over runs of 2 processes needs a launcher that starts them: hydra/launcher=slurm" in done.stderr
