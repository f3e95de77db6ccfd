"""Starts the project's programs as a user does, without the seconds that their imports take.

`python -m tests.programs` imports everything once and forks a process per command, with its own arguments, environment, working
directory, output and exit status, as if Python had been started for it.
"""

import contextlib
import importlib
import itertools
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LATE_IMPORTS = (
    *("alembic.command", "datasets", "git", "hydra._internal.core_plugins.basic_sweeper", "matplotlib.backends.backend_agg"),
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking", "peft.tuners.lora", "transformers.models.qwen2.modeling_qwen2"),
)
"""What runs import only when they come to it."""


class Program:
    """A command that was started, much like subprocess.Popen.

    Attributes:
        pid: of its process.
        stdout, stderr: files with its output so far.
    """

    def __init__(self, programs: "Programs", pid: int, stdout: Path, stderr: Path) -> None:
        self._programs, self.pid, self.stdout, self.stderr = programs, pid, stdout, stderr

    def poll(self) -> int | None:
        """Returns the exit status, or minus the signal that ended it; None while it runs."""
        return self._programs.ask({"poll": self.pid})

    def wait(self, timeout: float = 600) -> int:
        """Returns the exit status; raises TimeoutError."""
        self._wait_until(lambda: self.poll() is not None, timeout)
        return self.poll()

    def wait_for(self, line: str, timeout: float = 600) -> None:
        """Waits until its standard output holds a line; raises TimeoutError, or RuntimeError if it ends before."""

        def said() -> bool:
            ended = self.poll() is not None
            if line in self.stdout.read_text():
                return True
            if ended:
                raise RuntimeError(f"ended before it said {line!r}: {self.stderr.read_text()[-3000:]}")
            return False

        self._wait_until(said, timeout)

    def _wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} still runs: {self.stderr.read_text()[-3000:]}")
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def free_port() -> int:
    """Returns a port that is free on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Programs:
    """Starts commands; their output goes to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def __enter__(self) -> "Programs":
        environment = {name: value for name, value in os.environ.items() if name != "PROJECT_ROOT"} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.programs"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        """Returns the forking process's answer to a request."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, log: Path | None = None) -> Program:
        """Starts `<file> ...`, `-m <module> ...` or `-c <code> ...`, as `python` takes them.

        Args:
            cwd: its working directory; the project is found from anywhere.
            env: its environment, by default this process's; without effect on libraries that read it when imported.
            log: a file that all output is appended to.
        """
        output = self.folder / str(next(self._numbers))
        stdout, stderr = (log, log) if log else (output.with_suffix(".out"), output.with_suffix(".err"))
        request = {"command": command, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        stdout.touch()
        stderr.touch()
        pid = self.ask({**request, "stdout": str(stdout), "stderr": str(stderr)})
        return Program(self, pid, stdout, stderr)

    def run(self, *command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """Runs a command to its end."""
        program = self.start(*command, cwd=cwd, env=env)
        status = program.wait()
        return subprocess.CompletedProcess(command, status, program.stdout.read_text(), program.stderr.read_text())


# ---- in the process that forks


def _import_all() -> None:
    import src

    modules = [module.name for module in pkgutil.walk_packages(src.__path__, "src.")]
    for name in (*modules, "train", "evaluate", *LATE_IMPORTS):
        importlib.import_module(name)


def _serve() -> dict[str, Any] | None:
    """Answers requests; returns in a forked process its request, else None at the end, after killing what still runs."""
    ended: dict[int, int | None] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "poll" in request:
            answer = _status(request["poll"], ended)
        else:
            answer = os.fork()
            if answer == 0:
                return request
            ended[answer] = None
        print(json.dumps(answer), flush=True)
    for pid in ended:
        if _status(pid, ended) is None:
            os.kill(pid, signal.SIGKILL)
    return None


def _status(pid: int, ended: dict[int, int | None]) -> int | None:
    if ended[pid] is None:
        child, status = os.waitpid(pid, os.WNOHANG)
        if child:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _become(request: dict[str, Any]) -> None:
    """Runs a command in this process, which then ends as any other does."""
    opened = (os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("stdout", "stderr"))
    for number, (path, mode) in enumerate(opened):
        os.dup2(os.open(path, mode, 0o644), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program, *arguments = request["command"]
    if program not in ("-m", "-c"):
        sys.argv = [program, *arguments]
        runpy.run_path(str(ROOT / program), run_name="__main__")
        return
    name, *arguments = arguments
    sys.argv = [program, *arguments]
    if program == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        exec(name, {"__name__": "__main__"})


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers
        _import_all()
    if (found := _serve()) is not None:
        _become(found)
