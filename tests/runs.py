"""Runs of training in processes of their own, of one rank or of several, that are killed, signalled and gone on with."""

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from tests.programs import Programs, free_port

ROOT = Path(__file__).resolve().parents[1]


class KillAt(L.Callback):
    """SIGKILL, some seconds after a rollout batch has begun: wherever the process then is. Of one rank alone, or of all."""

    def __init__(self, batch: int, seconds: float, signal_number: int = signal.SIGKILL, rank: int | None = None) -> None:
        self.batch, self.seconds, self.signal_number, self.rank = batch, seconds, signal_number, rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollout_batches == self.batch and self.rank in (None, trainer.global_rank):
            timer = threading.Timer(self.seconds, os.kill, (os.getpid(), self.signal_number))
            timer.daemon = True
            timer.start()


class KillIn(L.Callback):
    """SIGKILL in one of Lightning's hooks: while a run starts, or ends."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


class Slow(L.Callback):
    """A rank that the others wait for, inside of what they do together."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


class Runs:
    """Starts them.

    Args:
        programs: forks the processes.
        log: where all that they say goes.
    """

    def __init__(self, programs: Programs, log: Path) -> None:
        self.programs, self.log = programs, log

    def run(self, folder: Path, *overrides: str, **environment: str) -> int:
        """Trains in a folder; the exit status, or minus the signal that ended it."""
        return self._ask(folder, overrides, [environment])[0]

    def run_ranks(self, folder: Path, *overrides: str, ranks: int = 2, **environment: str) -> list[int]:
        """The same with several processes, as a cluster's launcher starts them; those that hang are killed after a while."""
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        own = [environment | together | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return self._ask(folder, ("trainer=cpu_ddp", f"trainer.devices={ranks}", *overrides), own)

    def _ask(self, folder: Path, overrides: Sequence[str], environments: Sequence[dict[str, str]]) -> list[int]:
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

    def kill_and_resume(self, folder: Path, kills: int, seed: int, longest: int, *overrides: str) -> int:
        """Kills a run `kills` times, each after one to `longest` batches more, and lets it end; the last exit status."""
        rng = random.Random(seed)

        def again() -> list[str]:
            return ["ckpt_path=last"] if batches_saved(folder) else []

        for kill in range(kills):
            at, seconds = batches_saved(folder) + rng.randrange(longest), rng.uniform(0.0, 0.5)
            killer = f"+callbacks.killer={{_target_:tests.runs.KillAt,batch:{at},seconds:{seconds}}}"
            status = self.run(folder, *overrides, killer, *again())
            if status != -signal.SIGKILL:
                raise RuntimeError(f"kill {kill + 1} at batch {at}: the run ended with status {status} by itself, see {self.log}")
        return self.run(folder, *overrides, *again())


def batches_saved(folder: Path) -> int:
    """Rollout batches of a run's last checkpoint."""
    contents = folder / "checkpoints" / "last.ckpt" / "checkpoint.json"
    return int(json.loads(contents.read_text())["rollout_batches"]) if contents.exists() else 0


LONGEST = 300.0
"""Seconds after the first of several ranks has ended in which the others must have."""


def train_here() -> None:
    """What a process does: a run with the overrides and in the folder of its argument."""
    from hydra import compose, initialize_config_dir
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from omegaconf import open_dict

    from train import train

    request = json.loads(sys.argv[1])
    rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))  # as it is when Lightning is imported
    print(f"--- {time.time():.1f} {request}", flush=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = compose("train", overrides=request["overrides"])
    with open_dict(cfg):
        cfg.paths.output_dir = request["folder"]
    train(cfg)
