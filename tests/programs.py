"""The project's programs as a user starts them, without the seconds that their imports take.

`python -m tests.programs` imports everything once and forks a process for each command: with arguments, environment, working
directory, output and exit status of its own, as if Python had been started for it.
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
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

USED = (
    *("alembic.command", "datasets", "git", "hydra._internal.core_plugins.basic_sweeper", "matplotlib.backends.backend_agg"),
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking", "peft.tuners.lora", "transformers.models.qwen2.modeling_qwen2"),
)
"""What runs import only when they come to it."""


class Program:
    """A command that was started, much like subprocess.Popen.

    Attributes:
        pid: of its process.
        stdout, stderr: files with what it said so far.
    """

    def __init__(self, programs: "Programs", pid: int, stdout: Path, stderr: Path) -> None:
        self._programs, self.pid, self.stdout, self.stderr = programs, pid, stdout, stderr

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        status: int | None = self._programs.ask({"poll": self.pid})
        return status

    def wait(self, timeout: float = 600) -> int:
        """The exit status.

        Raises:
            TimeoutError: it takes longer.
        """
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} still runs: {self.stderr.read_text()[-3000:]}")
            time.sleep(0.02)
        return status

    def wait_for(self, line: str, timeout: float = 600) -> None:
        """Until it has said so.

        Raises:
            RuntimeError: it ended before.
            TimeoutError: it takes longer.
        """
        until = time.monotonic() + timeout
        while line not in self.stdout.read_text():
            if self.poll() is not None:
                raise RuntimeError(f"ended before it said {line!r}: {self.stderr.read_text()[-3000:]}")
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} has not said {line!r}")
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Programs:
    """Starts commands.

    Args:
        folder: where they leave what they say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def __enter__(self) -> "Programs":
        environment = {name: value for name, value in os.environ.items() if name != "PROJECT_ROOT"} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.programs"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        """Sends one request to the process that forks, and returns its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, log: Path | None = None) -> Program:
        """Starts `<file> ...`, `-m <module> ...` or `-c <code> ...`, as `python` takes them.

        Args:
            cwd: its working directory; the project is found from anywhere.
            env: its environment, by default this process's. Variables that libraries read while they are imported have no effect.
            log: takes in all that it says, behind what is there.
        """
        output = self.folder / str(next(self._numbers))
        stdout, stderr = (log, log) if log else (output.with_suffix(".out"), output.with_suffix(".err"))
        request = {"command": command, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        stdout.touch()
        stderr.touch()
        pid = self.ask({**request, "stdout": str(stdout), "stderr": str(stderr)})
        return Program(self, pid, stdout, stderr)

    def run(self, *command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """The same, to its end."""
        program = self.start(*command, cwd=cwd, env=env)
        status = program.wait()
        return subprocess.CompletedProcess(command, status, program.stdout.read_text(), program.stderr.read_text())


def _import_all() -> None:
    import src

    modules = [module.name for module in pkgutil.walk_packages(src.__path__, "src.")]
    for name in (*modules, "train", "evaluate", *USED):
        importlib.import_module(name)


def _serve() -> dict[str, Any] | None:
    """Answers requests; in a forked process it returns what that process is to run, and None where there are no more.

    What still runs then is killed: nobody waits for it.
    """
    started: set[int] = set()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "poll" in request:
            answer = _status(request["poll"], ended)
        else:
            answer = os.fork()
            if answer == 0:
                return request
            started.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in started:
        if _status(pid, ended) is None:
            os.kill(pid, signal.SIGKILL)
    return None


def _status(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        child, status = os.waitpid(pid, os.WNOHANG)
        if child:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def _become(request: dict[str, Any]) -> None:
    """Runs a command in this process, which then ends as any other does."""
    opened = (os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("stdout", "stderr"))
    for number, (path, how) in enumerate(opened):
        os.dup2(os.open(path, how, 0o644), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program, *arguments = request["command"]
    if program in ("-m", "-c"):
        name, *arguments = arguments
        sys.argv = [program, *arguments]
        if program == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            exec(name, {"__name__": "__main__"})
        return
    sys.argv = [program, *arguments]
    runpy.run_path(str(ROOT / program), run_name="__main__")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # answers alone go to standard output
        _import_all()
    if (found := _serve()) is not None:
        _become(found)
