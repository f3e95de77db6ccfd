"""Runs that are killed and go on end where an uninterrupted run ends: weights, MLflow's history, files."""

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
from tests.programs import Programs
from tests.runs import Runs, batches_saved

CLOCK = ("seconds/", "throughput/", "memory/", "mteb/seconds")
"""Metrics of the clock and the machine, which no two runs share."""


@pytest.fixture(scope="module")
def runs(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(programs, tmp_path_factory.mktemp("runs") / "log.txt")


@pytest.fixture(scope="module")
def small(tiny_policy_folder: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run in which everything that has a state has one: dropout, warm-up, groups held for an update, watching callbacks."""
    base = tmp_path_factory.getbasetemp()
    return [
        "experiment=tiny_sup",
        f"policy.path={tiny_policy_folder}",
        f"paths.cache_dir={base}/docstrings",
        f"paths.tracking_uri={tracking_uri}",
        f"paths.artifact_location=file://{base}/artifacts",
        *("packages.train=[urllib3]", "packages.validation=[rich]", "datamodule.modules_per_batch=2", "datamodule.docstrings_per_module=2"),
        *("algorithm=dapo", "reward=document", "algorithm.gae_lambda=null", "algorithm.truncation=none"),
        *("algorithm.min_group_std=0.2", "algorithm.max_extra_batches=2", "algorithm.updates_per_batch=2"),
        *("policy/lora=all_linear", "policy.lora.lora_dropout=0.2"),
        *("module.num_generations=3", "module.learning_rate=1e-3", "module.warmup_steps=12", "rollout.max_new_tokens=6"),
        *("callbacks.mteb=null", "callbacks.final_report=null", "callbacks.export=null", "callbacks.html_report=null"),
        *("callbacks.rationale_table.texts=2", "callbacks.rationale_table.every_n_rollout_batches=3"),
        "callbacks.similarities.records=3",
        *("callbacks.reward_diagnostics.figure_path=null", "callbacks.similarities.figure_path=null"),  # 40 % of so short a run
        *("callbacks.starting_policy_kl.texts=2", "callbacks.starting_policy_kl.every_n_rollout_batches=2"),
        *("callbacks.checkpoint.every_n_rollout_batches=2", "callbacks.checkpoint.monitor=reward/total/mean"),
        *("trainer.accelerator=cpu", "seed=5"),
    ]


SHORT = ("trainer.limit_train_batches=4", "trainer.max_epochs=2")
"""Eight rollout batches, in two epochs."""


@pytest.fixture(scope="module")
def whole(runs: Runs, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight batches that nothing stopped; its folder, by whose name its MLflow experiment goes too."""
    folder = tmp_path_factory.mktemp("whole")
    assert runs.run(folder, *small, *SHORT, f"project={folder.name}") == 0, runs.log.read_text()[-3000:]
    return folder


def run_of(client: MlflowClient, project: str) -> Run:
    """The one run of an experiment."""
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float | None]]]:
    """Steps and values of every metric; values of the clock are left out."""
    points = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: sorted((p.step, None if key.startswith(CLOCK) else p.value) for p in found) for key, found in points.items()}


def tables(client: MlflowClient, run: Run) -> dict[str, object]:
    mlflow.set_tracking_uri(client.tracking_uri)
    places = ("rationales", "similarities")
    files = [file.path for place in places for file in client.list_artifacts(run.info.run_id, place) if file.path.endswith(".json")]
    return {file: json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{file}")) for file in files}


def assert_alike(whole: Path, resumed: Path, tracking_uri: str, batches: int) -> None:
    """Both ended with the same weights and states, bit for bit, and MLflow holds the same of both."""
    assert batches_saved(whole) == batches_saved(resumed) == batches
    ours, theirs = (load_file(folder / "checkpoints" / "last.ckpt" / "weights.safetensors") for folder in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, resumed)]
    for key in ("optimizer_states", "lr_schedulers", "grace", "global_step"):
        assert_same(states[0][key], states[1][key], key)
    client = MlflowClient(tracking_uri)
    expected, found = (run_of(client, folder.name) for folder in (whole, resumed))
    assert expected.info.status == found.info.status == "FINISHED"
    assert [step for step, _ in history(client, expected)["reward/total/mean"]] == list(range(1, batches + 1))
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


def test_killed_twice_a_run_ends_as_if_it_never_was(runs: Runs, small: list[str], whole: Path, tmp_path: Path, tracking_uri: str) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}")
    for moment in ("setup", "on_fit_start"):  # of a run that has saved nothing yet
        assert runs.run(tmp_path, *own, f"+callbacks.killer={{_target_:tests.runs.KillIn,hook:{moment}}}") == -signal.SIGKILL
    status = runs.kill_and_resume(tmp_path, 2, 0, 3, *own)
    assert status == 0, runs.log.read_text()[-3000:]
    assert_alike(whole, tmp_path, tracking_uri, batches=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_a_run_ends_as_if_it_never_was(runs: Runs, small: list[str], tmp_path: Path, tracking_uri: str) -> None:
    length = ("trainer.limit_train_batches=16", "trainer.max_epochs=3")
    never, often = tmp_path / f"{tmp_path.name}_never", tmp_path / f"{tmp_path.name}_often"
    assert runs.run(never, *small, *length, f"project={never.name}") == 0, runs.log.read_text()[-3000:]
    assert runs.kill_and_resume(often, 10, 0, 4, *small, *length, f"project={often.name}") == 0, runs.log.read_text()[-3000:]
    assert_alike(never, often, tracking_uri, batches=48)


@pytest.mark.parametrize("every", [pytest.param(2, id="last batch saved"), pytest.param(3, id="saved before", marks=pytest.mark.slow)])
def test_killed_while_it_ends_a_run_ends_again(
    runs: Runs, small: list[str], whole: Path, tmp_path: Path, tracking_uri: str, every: int
) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}", f"callbacks.checkpoint.every_n_rollout_batches={every}")
    assert runs.run(tmp_path, *own, "+callbacks.killer={_target_:tests.runs.KillIn,hook:on_train_end}") == -signal.SIGKILL
    assert batches_saved(tmp_path) == (8 if every == 2 else 6)
    # killed again while it starts to go on
    assert (
        runs.run(tmp_path, *own, "ckpt_path=last", "+callbacks.killer={_target_:tests.runs.KillIn,hook:on_train_start}") == -signal.SIGKILL
    )
    status = runs.run(tmp_path, *own, "ckpt_path=last", "optimized_metric=reward/total/mean")
    assert status == 0, runs.log.read_text()[-3000:]
    assert_alike(whole, tmp_path, tracking_uri, batches=8)


@pytest.mark.parametrize(("signal_number", "batch"), [(signal.SIGUSR1, 4), (signal.SIGTERM, 3)], ids=["mid_epoch", "last_of_an_epoch"])
def test_a_run_told_to_stop_saves_says_so_and_goes_on(
    runs: Runs, small: list[str], whole: Path, tmp_path: Path, tracking_uri: str, signal_number: int, batch: int
) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}", "callbacks.checkpoint.every_n_rollout_batches=100")
    stop = f"+callbacks.killer={{_target_:tests.runs.KillAt,batch:{batch},seconds:0,signal_number:{signal_number:d}}}"
    assert runs.run(tmp_path, *own, stop) == TRY_AGAIN
    assert batches_saved(tmp_path) == batch + 1  # the batch was ended first
    assert run_of(MlflowClient(tracking_uri), tmp_path.name).info.status == "KILLED"
    assert "exit status 75: the same command with ckpt_path=last goes on" in runs.log.read_text()
    assert runs.run(tmp_path, *own, SLURM_RESTART_COUNT="1") == 0, runs.log.read_text()[-3000:]  # nobody says ckpt_path=last
    assert_alike(whole, tmp_path, tracking_uri, batches=8)


def test_a_run_told_to_stop_in_its_last_batch_ends(runs: Runs, small: list[str], whole: Path, tmp_path: Path, tracking_uri: str) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}", "optimized_metric=reward/total/mean")
    stop = f"+callbacks.killer={{_target_:tests.runs.KillAt,batch:7,seconds:0,signal_number:{signal.SIGTERM:d}}}"
    assert runs.run(tmp_path, *own, stop) == 0, runs.log.read_text()[-3000:]
    assert_alike(whole, tmp_path, tracking_uri, batches=8)


# ---- several processes


@pytest.fixture(scope="module")
def whole_of_two(runs: Runs, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two ranks."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    assert runs.run_ranks(folder, *small, *SHORT, f"project={folder.name}") == [0, 0], runs.log.read_text()[-3000:]
    return folder


@pytest.mark.parametrize(
    ("signalled", "slow", "batch"),
    [
        pytest.param("1", 0, 4, id="rank 1 alone"),
        pytest.param("0", 1, 3, id="rank 0 alone", marks=pytest.mark.slow),
        pytest.param("null", 1, 2, id="both ranks", marks=pytest.mark.slow),
    ],
)
def test_ranks_told_to_stop_end_the_same_batch_save_and_go_on(
    runs: Runs, small: list[str], whole_of_two: Path, tmp_path: Path, tracking_uri: str, signalled: str, slow: int, batch: int
) -> None:
    """The signal comes while the faster rank waits for the other, in what both do together."""
    own = (*small, *SHORT, f"project={tmp_path.name}", "callbacks.checkpoint.every_n_rollout_batches=100")
    killer = f"batch:{batch},seconds:0.1,signal_number:{signal.SIGUSR1:d},rank:{signalled}"
    stop = [
        f"+callbacks.slow={{_target_:tests.runs.Slow,rank:{slow},seconds:0.4}}",
        f"+callbacks.killer={{_target_:tests.runs.KillAt,{killer}}}",
    ]
    assert runs.run_ranks(tmp_path, *own, *stop) == [TRY_AGAIN, 0], runs.log.read_text()[-3000:]
    assert batches_saved(tmp_path) == batch + 1
    assert run_of(MlflowClient(tracking_uri), tmp_path.name).info.status == "KILLED"
    assert runs.run_ranks(tmp_path, *own, "ckpt_path=last") == [0, 0], runs.log.read_text()[-3000:]
    assert_alike(whole_of_two, tmp_path, tracking_uri, batches=8)


def test_a_rank_that_is_killed_ends_the_other_in_one_line_and_both_go_on(
    runs: Runs, small: list[str], whole_of_two: Path, tmp_path: Path, tracking_uri: str
) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}")
    killer = "+callbacks.killer={_target_:tests.runs.KillAt,batch:5,seconds:0,rank:1}"
    assert runs.run_ranks(tmp_path, *own, killer) == [1, -signal.SIGKILL], runs.log.read_text()[-3000:]
    assert "LostProcessError: rank 0: another of the 2 processes has ended" in runs.log.read_text()
    assert runs.run_ranks(tmp_path, *own, "ckpt_path=last") == [0, 0], runs.log.read_text()[-3000:]
    assert_alike(whole_of_two, tmp_path, tracking_uri, batches=8)


def test_other_settings_of_the_optimiser_are_used_and_said(
    runs: Runs, small: list[str], whole: Path, tmp_path: Path, tracking_uri: str
) -> None:
    branch = [f"ckpt_path={whole}/checkpoints/batch_6.ckpt", "module.learning_rate=5e-4", f"project={tmp_path.name}"]
    assert runs.run(tmp_path, *small, *SHORT, *branch) == 0, runs.log.read_text()[-3000:]
    assert "goes on with module.learning_rate=0.0005 in place of 0.001" in runs.log.read_text()
    client = MlflowClient(tracking_uri)
    assert [step for step, _ in history(client, run_of(client, tmp_path.name))["reward/total/mean"]] == [7, 8]  # a run of its own
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, tmp_path))
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in (ours, theirs)]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_other_settings_in_the_same_folder_begin_another_mlflow_run(
    runs: Runs, small: list[str], tmp_path: Path, tracking_uri: str
) -> None:
    own = (*small, *SHORT, f"project={tmp_path.name}", "callbacks.checkpoint.every_n_rollout_batches=3")
    killer = "+callbacks.killer={_target_:tests.runs.KillAt,batch:5,seconds:0}"
    assert runs.run(tmp_path, *own, killer) == -signal.SIGKILL  # points up to 5 at least, a checkpoint of 3
    assert runs.run(tmp_path, *own, "reward=paper", "ckpt_path=last") == 0, runs.log.read_text()[-3000:]
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    second, first = client.search_runs([experiment.experiment_id])
    assert second.data.tags["resumed_from"] == first.info.run_id
    # the third is what the checkpoint holds, in case the process that saved it had no time to log it
    assert [step for step, _ in history(client, second)["reward/total/mean"]] == [3, 4, 5, 6, 7, 8]
    assert [step for step, _ in history(client, first)["reward/total/mean"]][:5] == [1, 2, 3, 4, 5]
    assert "goes on with other settings than it began with: reward._target_=src.modules.objectives.rewards.paper" in runs.log.read_text()


def test_a_second_run_in_the_folder_of_a_first_is_refused(runs: Runs, small: list[str], whole: Path) -> None:
    before = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert runs.run(whole, *small, *SHORT, "logger=none") == 1
    assert f"{whole} holds a run already: go on with it by ckpt_path=last" in runs.log.read_text()
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == before
