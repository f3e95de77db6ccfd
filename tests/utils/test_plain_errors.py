"""Errors of settings, data and the machine are one line; others keep their traceback."""

import errno
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from src.modules.policy.loading import require_files
from src.utils.plain_errors import plain_errors, said
from tests.conftest import ROOT


def caught(function, *arguments):
    with pytest.raises(Exception) as found:  # noqa: PT011
        function(*arguments)
    return found.value


def test_own_errors_are_lines_also_within_a_config(tmp_path):
    assert said(caught(require_files, str(tmp_path))).startswith(f"no policy at '{tmp_path}': the folder has no config.json")
    wrapped = caught(instantiate, {"_target_": "src.modules.policy.loading.require_files", "path": str(tmp_path)})
    assert isinstance(wrapped, InstantiationException)
    assert said(wrapped).startswith(f"no policy at '{tmp_path}'")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/dev/null"), "no space left for /dev/null ("),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "[Errno 111] Connection refused"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory (CUDA out of memory. Tried): dry_run=true"),
    ],
)
def test_errors_of_the_machine_are_lines(error, line):
    assert said(error).startswith(line)


@pytest.mark.parametrize("function", [lambda: {}["absent"], lambda: torch.zeros(2) @ torch.zeros(3), lambda: torch.zeros(2).nothing])
def test_errors_in_code_keep_their_traceback(function):
    error = caught(function)
    assert said(error) is None
    with pytest.raises(type(error)), plain_errors("train.py"):
        raise error


def test_traceback_goes_to_the_log_file(tmp_path, monkeypatch):
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    try:
        with pytest.raises(SystemExit, match=r"^train.py: no policy at") as ended, plain_errors("train.py"):
            require_files(str(tmp_path))
    finally:
        logging.getLogger().removeHandler(handler)
    assert "\n" not in str(ended.value)
    assert "Traceback (most recent call last)" in (tmp_path / "train.log").read_text()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError), plain_errors("train.py"):
        require_files(str(tmp_path))


class AskingProxy(BaseHTTPRequestHandler):
    """Wants a password."""

    def do_CONNECT(self):
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


HUB_CODE = """
from huggingface_hub import snapshot_download
from src.datamodules.files import find_files
from src.modules.policy.loading import find_model
from src.utils.plain_errors import plain_errors
for look in (find_model, lambda name: find_files(name, ["*.txt"]), snapshot_download):
    try:
        with plain_errors("x"):
            look({name!r})
    except SystemExit as ended:
        print(ended)
"""


@pytest.mark.parametrize(
    ("variables", "name", "why"),
    [
        pytest.param({"HF_ENDPOINT": "foo://bar"}, "owner/name", "unsupported protocol 'foo://'", marks=pytest.mark.slow),
        ({"HTTPS_PROXY": "http://127.0.0.1:{port}"}, "owner/name", "407 Proxy Authentication Required"),
        pytest.param({}, "owner/na..me", "Cannot have -- or .. in repo_id", marks=pytest.mark.slow),
    ],
)
def test_errors_of_the_hub_are_lines(tmp_path, variables, name, why):
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), AskingProxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    own = {key: value.format(port=proxy.server_port) for key, value in variables.items()}
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)} | own
    done = subprocess.run([sys.executable, "-c", HUB_CODE.format(name=name)], cwd=ROOT, env=environment, capture_output=True, text=True)
    proxy.shutdown()
    model, data, plain = done.stdout.splitlines()
    assert model.startswith(f"x: no policy at '{name}': ")
    assert data.startswith(f"x: no data at '{name}': ")
    assert all(why in line for line in (model, data, plain))


@pytest.mark.timeout(900)  # two processes: seconds on an idle machine, minutes on a busy one
def test_first_commands_that_go_wrong(run_train, tmp_path, places):
    for overrides, line in (
        (["experiment=nope"], "train.py: In 'train': Could not find 'experiment/nope'"),
        ([*places, "policy.path=/no/such"], "train.py: no policy at '/no/such'"),
    ):
        done = run_train(*overrides)
        last = done.stderr.strip().splitlines()[-1]
        assert (done.returncode, last[: len(line)]) == (1, line)
        assert "Traceback" not in done.stderr
        assert "HYDRA_FULL_ERROR" not in done.stderr


def test_python_without_the_dependencies_is_one_line(tmp_path):
    bare = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import runpy; sys.argv = ['train.py']; "
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"{bare}sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(Path(ROOT, 'train.py'))!r}, run_name='__main__')",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: torch, lightning, transformers, hydra, mlflow, mteb: not installed for ")
    assert len(done.stderr.splitlines()) == 1
