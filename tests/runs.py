"""Training runs in separate processes, of one rank or several, that are killed, signalled and resumed; what MLflow has of them."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.programs import ROOT, Programs, free_port

TINY = ["callbacks=minimal", "rollout.max_new_tokens=4"]

LONGEST = 300.0
"""Seconds within which the other ranks must end after the first."""


class KillAt(L.Callback):
    """Sends a signal some seconds after a rollout batch has begun, wherever the process then is; to one rank or all.

    `updating`: after its rationales are written, before its update.
    """

    def __init__(
        self, batch: int, seconds: float, signal_number: int = signal.SIGKILL, rank: int | None = None, updating: bool = False
    ) -> None:
        self.batch, self.seconds, self.signal_number, self.rank, self.updating = batch, seconds, signal_number, rank, updating

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.updating and pl_module.rollout_batches == self.batch:
            begin = pl_module.policy.train

            def begin_update(mode: bool = True) -> Any:
                if mode:
                    os.kill(os.getpid(), self.signal_number)
                return begin(mode)

            pl_module.policy.train = begin_update
        elif pl_module.rollout_batches == self.batch and self.rank in (None, trainer.global_rank):
            timer = threading.Timer(self.seconds, os.kill, (os.getpid(), self.signal_number))
            timer.daemon = True
            timer.start()


class KillIn(L.Callback):
    """SIGKILL in one of Lightning's hooks: while a run starts or ends."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


class Slow(L.Callback):
    """A rank that the others wait for in their collectives."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


def callback(name: str, **settings: Any) -> str:
    """The override that adds one of these callbacks."""
    given = ",".join(f"{key}:{'null' if value is None else value}" for key, value in settings.items())
    return f"+callbacks.{name.lower()}={{_target_:tests.runs.{name},{given}}}"


class Runs:
    """Starts runs; all their output goes to `log`."""

    def __init__(self, programs: Programs, log: Path) -> None:
        self.programs, self.log = programs, log

    def run(self, folder: Path, *overrides: str, **environment: str) -> int:
        """Trains in a folder; returns the exit status, or minus the signal that ended it."""
        return self._run(folder, overrides, [environment])[0]

    def run_ranks(self, folder: Path, *overrides: str, ranks: int = 2) -> list[int]:
        """Trains with several processes, as a cluster's launcher starts them; those that hang are killed."""
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        environments = [together | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return self._run(folder, ("trainer=cpu_ddp", f"trainer.devices={ranks}", *overrides), environments)

    def succeed(self, folder: Path, *overrides: str, ranks: int = 1, **environment: str) -> None:
        """Trains to the end."""
        statuses = self.run_ranks(folder, *overrides) if ranks > 1 else [self.run(folder, *overrides, **environment)]
        assert not any(statuses), self.log.read_text()[-3000:]

    def _run(self, folder: Path, overrides: Sequence[str], environments: Sequence[dict[str, str]]) -> list[int]:
        request = json.dumps({"overrides": list(overrides), "folder": str(folder)})
        started = [
            self.programs.start("-c", "from tests.runs import train_here; train_here()", request, env=os.environ | own, log=self.log)
            for own in environments
        ]
        deadline = float("inf")
        while any(running := [program.poll() is None for program in started]):
            if not all(running):
                deadline = min(deadline, time.monotonic() + LONGEST)
            if time.monotonic() > deadline:
                for hanging in itertools.compress(started, running):
                    hanging.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        return [program.wait() for program in started]

    def kill_and_resume(self, folder: Path, kills: int, seed: int, longest: int, *overrides: str) -> None:
        """Kills a run `kills` times, each after one to `longest` batches more, and lets it end."""
        rng = random.Random(seed)

        def resume() -> list[str]:
            return ["ckpt_path=last"] if batches_saved(folder) else []

        for kill in range(kills):
            at, seconds = batches_saved(folder) + rng.randrange(longest), rng.uniform(0.0, 0.1)  # one or two short batches
            status = self.run(folder, *overrides, callback("KillAt", batch=at, seconds=seconds), *resume())
            assert status == -signal.SIGKILL, f"kill {kill + 1} at batch {at}: ended with status {status}, see {self.log}"
        self.succeed(folder, *overrides, *resume())


def batches_saved(folder: Path) -> int:
    """Returns the rollout batches of a run's last checkpoint."""
    contents = folder / "checkpoints" / "last.ckpt" / "checkpoint.json"
    return int(json.loads(contents.read_text())["rollout_batches"]) if contents.exists() else 0


def mlflow_runs(client: MlflowClient, project: str) -> list[Run]:
    """Returns the runs of an experiment, the newest first."""
    experiment = client.get_experiment_by_name(project)
    return list(client.search_runs([experiment.experiment_id]))


def steps(client: MlflowClient, run: Run, metric: str = "reward/total/mean") -> list[int]:
    """Returns the steps at which a run logged a metric."""
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def stop_at(line: str, command: list[str]) -> tuple[int, str]:
    """Starts a command as users do and sends it SIGUSR1 when it says a line; returns its exit status and output."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        shown = ""
        for said in process.stdout:
            shown += said
            if line in said:
                process.send_signal(signal.SIGUSR1)
    return process.returncode, shown


def train_here() -> None:
    """Trains in this process with the overrides and in the folder of its argument."""
    from hydra import compose, initialize_config_dir
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from omegaconf import open_dict

    from train import train

    request = json.loads(sys.argv[1])
    rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))  # as Lightning sets it when imported
    print(f"--- {time.time():.1f} {request}", flush=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = compose("train", overrides=request["overrides"])
    with open_dict(cfg):
        cfg.paths.output_dir = request["folder"]
    train(cfg)
