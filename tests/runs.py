"""Runs of train.py in processes of their own: `python -m tests.runs` imports everything once and forks a process for each."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L

ROOT = Path(__file__).resolve().parents[1]


class KillAt(L.Callback):
    """SIGKILL, some seconds after a rollout batch has begun: wherever the process then is."""

    def __init__(self, batch: int, seconds: float, signal_number: int = signal.SIGKILL) -> None:
        self.batch, self.seconds, self.signal_number = batch, seconds, signal_number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollout_batches == self.batch:
            timer = threading.Timer(self.seconds, os.kill, (os.getpid(), self.signal_number))
            timer.daemon = True
            timer.start()


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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"overrides": list(overrides), "folder": str(folder), "environment": environment}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def kill_and_resume(self, folder: Path, kills: int, seed: int, longest: int, *overrides: str) -> int:
        """Kills a run `kills` times, each after one to `longest` batches more, and lets it end; the last exit status."""
        rng = random.Random(seed)
        for kill in range(kills):
            at, seconds = batches_saved(folder) + rng.randrange(longest), rng.uniform(0.0, 0.5)
            killer = f"+callbacks.killer={{_target_:tests.runs.KillAt,batch:{at},seconds:{seconds}}}"
            status = self.run(folder, *overrides, killer, *(["ckpt_path=last"] if kill else []))
            if status != -signal.SIGKILL:
                raise RuntimeError(f"kill {kill + 1} at batch {at}: the run ended with status {status} by itself, see {self.log}")
        return self.run(folder, *overrides, "ckpt_path=last")


def batches_saved(folder: Path) -> int:
    """Rollout batches of a run's last checkpoint."""
    contents = folder / "checkpoints" / "last.ckpt" / "checkpoint.json"
    return int(json.loads(contents.read_text())["rollout_batches"]) if contents.exists() else 0


def _serve(log: str) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from train import train

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request["environment"])
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
        finally:
            if status == 1:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
