"""Runs of train.py in processes of their own: `python -m tests.runs` imports everything once and forks a process for each."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import lightning as L

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
    """Asks such a process for runs.

    Args:
        log: where the runs' own output goes.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> "Runs":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PROJECT_ROOT": str(ROOT)}
        command = [sys.executable, "-m", "tests.runs", str(self.log)]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, folder: Path, *overrides: str, **environment: str) -> int:
        """Trains in a folder; the exit status, or minus the signal that ended it."""
        return self._ask(folder, overrides, [environment])[0]

    def run_ranks(self, folder: Path, *overrides: str, ranks: int = 2, **environment: str) -> list[int]:
        """The same with several processes, as a cluster's launcher starts them; those that hang are killed after a while."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        own = [environment | together | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return self._ask(folder, ("trainer=cpu_ddp", f"trainer.devices={ranks}", *overrides), own)

    def _ask(self, folder: Path, overrides: Sequence[str], environments: Sequence[dict[str, str]]) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"overrides": list(overrides), "folder": str(folder), "environments": environments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [int(status) for status in self._process.stdout.readline().split()]

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


def _serve(log: str) -> None:
    import train  # noqa: F401  # once, for all

    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            child = os.fork()
            if child == 0:
                _train(log, request, environment)
            children.append(child)
        print(*(str(status) for status in _statuses(children)), flush=True)


def _statuses(children: list[int]) -> list[int]:
    ended: dict[int, int] = {}
    deadline = float("inf")
    while len(ended) < len(children):
        child, status = os.waitpid(-1, 0 if not ended else os.WNOHANG)
        if child:
            ended[child] = os.waitstatus_to_exitcode(status)
            deadline = min(deadline, time.monotonic() + LONGEST)
        elif time.monotonic() > deadline:
            for hanging in set(children) - set(ended):
                os.kill(hanging, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.05)
    return [ended[child] for child in children]


def _train(log: str, request: dict[str, Any], environment: dict[str, str]) -> NoReturn:
    from hydra import compose, initialize_config_dir
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from omegaconf import open_dict

    from train import train

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # as it is when Lightning is imported
    status = 1
    try:
        print(f"--- {time.time():.1f} {request}", flush=True)
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
            cfg = compose("train", overrides=request["overrides"])
        with open_dict(cfg):
            cfg.paths.output_dir = request["folder"]
        train(cfg)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code)
    except BaseException:  # noqa: BLE001  # a forked process that went on would serve the next request too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
