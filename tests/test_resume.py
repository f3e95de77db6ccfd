"""Runs that are killed and resumed end where an uninterrupted run ends: weights, MLflow's history, files."""

import json
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from src.utils.checkpoint_io import read_checkpoint
from src.utils.preemption import TRY_AGAIN
from src.utils.run_history import MACHINE
from tests.programs import Programs
from tests.runs import Runs, batches_saved, callback, mlflow_runs, steps

OF_THE_MACHINE = ("seconds/", "throughput/", "memory/", "mteb/seconds")
"""Metrics that differ between any two runs."""

SHORT = ("trainer.limit_train_batches=4", "trainer.max_epochs=2")
"""Eight rollout batches, in two epochs."""

SAVE_NEVER = "callbacks.checkpoint.every_n_rollout_batches=100"


@pytest.fixture(scope="module")
def runs(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(programs, tmp_path_factory.mktemp("runs") / "log.txt")


@pytest.fixture(scope="module")
def small(tiny_policy_folder: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with every kind of state: dropout, warm-up, groups held for an update, monitoring callbacks."""
    base = tmp_path_factory.getbasetemp()
    return [
        *("experiment=tiny_sup", f"policy.path={tiny_policy_folder}", f"paths.cache_dir={base}/docstrings"),
        *(f"paths.tracking_uri={tracking_uri}", f"paths.artifact_location=file://{base}/artifacts"),
        *("packages.train=[urllib3]", "packages.validation=[rich]", "datamodule.modules_per_batch=2", "datamodule.docstrings_per_module=2"),
        *("algorithm=dapo", "reward=document", "algorithm.gae_lambda=null", "algorithm.truncation=none"),
        *("algorithm.min_group_std=0.2", "algorithm.max_extra_batches=2", "algorithm.updates_per_batch=2"),
        *("policy/lora=all_linear", "policy.lora.lora_dropout=0.2"),
        *("module.num_generations=3", "module.learning_rate=1e-3", "module.warmup_steps=12", "rollout.max_new_tokens=6"),
        *("callbacks.mteb=null", "callbacks.final_report=null", "callbacks.export=null", "callbacks.html_report=null"),
        *("callbacks.rationale_table.texts=2", "callbacks.rationale_table.every_n_rollout_batches=3"),
        "callbacks.similarities.records=3",
        *("callbacks.metrics.figure_path=null", "callbacks.similarities.figure_path=null"),  # 40 % of so short a run
        *("callbacks.starting_policy_kl.texts=2", "callbacks.starting_policy_kl.every_n_rollout_batches=2"),
        *("callbacks.checkpoint.every_n_rollout_batches=2", "callbacks.checkpoint.monitor=reward/total/mean"),
        *("trainer.accelerator=cpu", "seed=5"),
    ]


@pytest.fixture(scope="module")
def reference(runs: Runs, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; its name is that of its MLflow experiment."""
    folder = tmp_path_factory.mktemp("reference")
    runs.succeed(folder, *small, *SHORT, f"project={folder.name}")
    return folder


@pytest.fixture(scope="module")
def reference_of_two(runs: Runs, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two ranks."""
    folder = tmp_path_factory.mktemp("reference_of_two")
    runs.succeed(folder, *small, *SHORT, f"project={folder.name}", ranks=2)
    return folder


@pytest.fixture
def own(small: list[str], tmp_path: Path) -> list[str]:
    """The settings of a short run in an MLflow experiment of its own."""
    return [*small, *SHORT, f"project={tmp_path.name}"]


def status(uri: str, folder: Path) -> str:
    (run,) = mlflow_runs(MlflowClient(uri), folder.name)
    return str(run.info.status)


def history(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float | None]]]:
    """Steps and values of every metric; no values of the machine."""
    points = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics if not key.startswith(MACHINE)}
    return {key: sorted((p.step, None if key.startswith(OF_THE_MACHINE) else p.value) for p in found) for key, found in points.items()}


def tables(client: MlflowClient, run: Run) -> dict[str, object]:
    mlflow.set_tracking_uri(client.tracking_uri)
    files = [file.path for place in ("rationales", "similarities") for file in client.list_artifacts(run.info.run_id, place)]
    return {file: json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{file}")) for file in files if file.endswith(".json")}


def assert_alike(reference: Path, resumed: Path, tracking_uri: str, batches: int = 8) -> None:
    """Both ended with the same weights and states, bit for bit, and MLflow holds the same of both."""
    folders = (reference, resumed)
    assert [batches_saved(folder) for folder in folders] == [batches, batches]
    weights = [load_file(folder / "checkpoints" / "last.ckpt" / "weights.safetensors") for folder in folders]
    assert_same(*weights, "weights")
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in folders]
    for key in ("optimizer_states", "lr_schedulers", "grace", "global_step"):
        assert_same(states[0][key], states[1][key], key)
    client = MlflowClient(tracking_uri)
    (expected,), (found,) = (mlflow_runs(client, folder.name) for folder in folders)
    assert expected.info.status == found.info.status == "FINISHED"
    assert steps(client, expected) == list(range(1, batches + 1))
    assert history(client, found) == history(client, expected)
    assert tables(client, found) == tables(client, expected)


def assert_same(ours: Any, theirs: Any, name: str) -> None:
    """Nested containers with the same values, tensors bit for bit."""
    assert type(ours) is type(theirs), name
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), name
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{name}[{place}]")
    else:
        assert ours == theirs, name


# ---- one process


@pytest.mark.slow
def test_killed_twice(runs, own, reference, tmp_path, tracking_uri):
    for hook in ("setup", "on_fit_start"):  # before anything was saved
        assert runs.run(tmp_path, *own, callback("KillIn", hook=hook)) == -signal.SIGKILL
    runs.kill_and_resume(tmp_path, 2, 0, 3, *own)
    assert_alike(reference, tmp_path, tracking_uri)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times(runs, small, tmp_path, tracking_uri):
    length = ("trainer.limit_train_batches=16", "trainer.max_epochs=3")
    never, often = tmp_path / f"{tmp_path.name}_never", tmp_path / f"{tmp_path.name}_often"
    runs.succeed(never, *small, *length, f"project={never.name}")
    runs.kill_and_resume(often, 10, 0, 4, *small, *length, f"project={often.name}")
    assert_alike(never, often, tracking_uri, batches=48)


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(2, id="last batch saved"), pytest.param(3, id="saved before")])
def test_killed_at_the_end(runs, own, reference, tmp_path, tracking_uri, every):
    own = [*own, f"callbacks.checkpoint.every_n_rollout_batches={every}"]
    assert runs.run(tmp_path, *own, callback("KillIn", hook="on_train_end")) == -signal.SIGKILL
    assert batches_saved(tmp_path) == (8 if every == 2 else 6)
    assert runs.run(tmp_path, *own, "ckpt_path=last", callback("KillIn", hook="on_train_start")) == -signal.SIGKILL  # while it resumes
    runs.succeed(tmp_path, *own, "ckpt_path=last", "optimized_metric=reward/total/mean")
    assert_alike(reference, tmp_path, tracking_uri)


@pytest.mark.parametrize(
    ("number", "batch"),
    [
        pytest.param(signal.SIGUSR1, 4, id="mid_epoch", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 3, id="last_of_an_epoch", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, id="ctrl_c"),
    ],
)
def test_signalled(runs, own, reference, tmp_path, tracking_uri, number, batch):
    stop = callback("KillAt", batch=batch, seconds=0, signal_number=int(number))
    assert runs.run(tmp_path, *own, SAVE_NEVER, stop) == TRY_AGAIN
    assert batches_saved(tmp_path) == batch  # the batch ended with its rationales, and begins again
    assert status(tracking_uri, tmp_path) == "KILLED"
    assert "exit status 75: the same command with ckpt_path=last goes on" in runs.log.read_text()
    runs.succeed(tmp_path, *own, SAVE_NEVER, SLURM_RESTART_COUNT="1")  # without ckpt_path=last
    assert_alike(reference, tmp_path, tracking_uri)


def test_signalled_in_an_update(runs, own, reference, tmp_path, tracking_uri):
    stop = callback("KillAt", batch=4, seconds=0, signal_number=int(signal.SIGTERM), updating=True)
    assert runs.run(tmp_path, *own, SAVE_NEVER, stop) == TRY_AGAIN
    assert batches_saved(tmp_path) == 5  # the batch was finished
    runs.succeed(tmp_path, *own, SAVE_NEVER, "ckpt_path=last")
    assert_alike(reference, tmp_path, tracking_uri)


@pytest.mark.slow
def test_signalled_in_the_last_update(runs, own, reference, tmp_path, tracking_uri):
    stop = callback("KillAt", batch=7, seconds=0, signal_number=int(signal.SIGTERM), updating=True)
    runs.succeed(tmp_path, *own, "optimized_metric=reward/total/mean", stop)
    assert_alike(reference, tmp_path, tracking_uri)


# ---- two processes


@pytest.mark.parametrize(
    ("signalled", "slow", "batch"),
    [
        pytest.param(1, 0, 4, id="rank 1 alone"),
        pytest.param(0, 1, 3, id="rank 0 alone", marks=pytest.mark.slow),
        pytest.param(None, 1, 2, id="both ranks", marks=pytest.mark.slow),
    ],
)
def test_ranks_signalled(runs, own, reference_of_two, tmp_path, tracking_uri, signalled, slow, batch):
    """The signal comes while the faster rank waits for the other in a collective."""
    stop = callback("KillAt", batch=batch, seconds=0.1, signal_number=int(signal.SIGUSR1), rank=signalled)
    statuses = runs.run_ranks(tmp_path, *own, SAVE_NEVER, callback("Slow", rank=slow, seconds=0.4), stop)
    assert statuses == [TRY_AGAIN, 0], runs.log.read_text()[-3000:]
    assert batches_saved(tmp_path) == batch
    assert status(tracking_uri, tmp_path) == "KILLED"
    runs.succeed(tmp_path, *own, SAVE_NEVER, "ckpt_path=last", ranks=2)
    assert_alike(reference_of_two, tmp_path, tracking_uri)


@pytest.mark.slow
def test_rank_killed(runs, own, reference_of_two, tmp_path, tracking_uri):
    statuses = runs.run_ranks(tmp_path, *own, callback("KillAt", batch=5, seconds=0, rank=1))
    assert statuses == [1, -signal.SIGKILL], runs.log.read_text()[-3000:]
    assert "LostProcessError: rank 0: another of the 2 processes has ended" in runs.log.read_text()
    runs.succeed(tmp_path, *own, "ckpt_path=last", ranks=2)
    assert_alike(reference_of_two, tmp_path, tracking_uri)


# ---- other settings, one run a folder


def test_new_optimizer_settings_are_used(runs, own, reference, tmp_path, tracking_uri):
    runs.succeed(tmp_path, *own, f"ckpt_path={reference}/checkpoints/batch_6.ckpt", "module.learning_rate=5e-4")
    assert "module.learning_rate=0.0005 in place of 0.001" in runs.log.read_text()
    client = MlflowClient(tracking_uri)
    (run,) = mlflow_runs(client, tmp_path.name)  # a branch is a run of its own
    assert steps(client, run) == [7, 8]
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (reference, tmp_path)]
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in states]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_new_settings_start_another_mlflow_run(runs, own, tmp_path, tracking_uri):
    own = [*own, "callbacks.checkpoint.every_n_rollout_batches=3"]
    assert runs.run(tmp_path, *own, callback("KillAt", batch=5, seconds=0)) == -signal.SIGKILL  # logged up to 5, saved 3
    runs.succeed(tmp_path, *own, "reward=paper", "ckpt_path=last")
    client = MlflowClient(tracking_uri)
    second, first = mlflow_runs(client, tmp_path.name)
    assert second.data.tags["resumed_from"] == first.info.run_id
    assert json.loads((tmp_path / "mlflow" / "run.json").read_text())["run_id"] == second.info.run_id  # a further resume logs to it
    assert (tmp_path / "mlflow" / f"run_{first.info.run_id}.json").exists()
    # a batch is logged before its checkpoint is saved, so what was saved is in the first run
    assert steps(client, second) == [4, 5, 6, 7, 8]
    assert steps(client, first)[:5] == [1, 2, 3, 4, 5]
    assert "goes on with other settings than it began with: reward._target_=src.modules.objectives.rewards.paper" in runs.log.read_text()


def test_data_that_changed_is_refused_or_named(runs, small, tmp_path, tracking_uri):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"A sentence about the number {i}.\n" for i in range(40)))
    own = [
        *small,
        "datamodule=wiki1m",
        f"datamodule.path={file}",
        "datamodule.batch_size=4",
        "reward=unsupervised",
    ]
    own = [override for override in own if not override.startswith(("datamodule.modules", "datamodule.docstrings", "reward=doc"))]
    own += [f"project={tmp_path.name}", "trainer.limit_train_batches=2"]
    runs.succeed(tmp_path / "run", *own, "trainer.max_epochs=1")
    file.write_text(file.read_text() + "".join(f"Another sentence about {i}.\n" for i in range(10)))
    again = [*own, "trainer.max_epochs=2", "ckpt_path=last"]
    assert runs.run(tmp_path / "run", *again) == 1
    said = runs.log.read_text().strip().splitlines()[-1]
    assert "data.digest=" in said
    assert "data.records=50 in place of 40): put it back, start a new run, or go on" in said
    assert said.endswith("by allow_changed_data=true")
    runs.succeed(tmp_path / "run", *again, "allow_changed_data=true")
    client = MlflowClient(tracking_uri)
    second, first = mlflow_runs(client, tmp_path.name)
    assert second.data.tags["resumed_from"] == first.info.run_id
    assert "goes on with other settings than it began with: data.digest=" in runs.log.read_text()
