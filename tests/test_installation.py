"""Installation: what goes wrong is a line, folders may have a space, and vLLM finds what it needs though it brings nothing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from src.modules.rollouts.vllm import VLLMEngine
from tests.conftest import ROOT
from tests.vllm_builders import NEEDS_VLLM


@pytest.mark.parametrize(
    ("python", "environment", "line"),
    [
        (
            "/bin/false",
            {},
            "installation: Python 3.11 or newer is needed and '/bin/false' is not: name one, as in make train PYTHON=python3.12",
        ),
        (sys.executable, {"GRACE_LEAST_FREE_MIB": "999999999999"}, "MB are free: make room"),
        (
            sys.executable,
            {"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"},
            "HTTPS_PROXY, PIP_INDEX_URL or PIP_FIND_LINKS say where packages come from",
        ),
    ],
    ids=["old Python", "full disk", "no network"],
)
def test_installation_that_fails_is_said(tmp_path, python, environment, line):
    folder = tmp_path / "with a space"
    folder.mkdir()
    for file in ("install.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    done = subprocess.run(
        [folder / "install.sh", python, "", "smollm2"], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(line)
    assert "Traceback" not in done.stderr


def test_targets_work_in_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    for file in ("Makefile", "install.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text('#!/bin/sh\nfor word; do :; done\necho "opens $word"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    outer_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS"}  # it adds lines to the output, if tests run under one
    without = {name: value for name, value in os.environ.items() if name not in outer_make | {"MLFLOW_TRACKING_URI"}}
    for variable, store in (({}, f"sqlite:///{folder}/mlflow.db"), ({"MLFLOW_TRACKING_URI": "sqlite:///$x y.db"}, "sqlite:///$x y.db")):
        make = ["make", "--silent", "--old-file=.venv/installed", "ui"]
        shown = subprocess.run(make, cwd=folder, env=without | variable, capture_output=True, text=True, check=True).stdout
        assert shown.strip() == f"opens {store}"
    targets = subprocess.run(["make", "help"], cwd=folder, env=without, capture_output=True, text=True, check=True).stdout.split("\n")
    for target in [line.split()[0] for line in targets if line.strip()]:
        subprocess.run(["make", "-n", target], cwd=folder, env=without, capture_output=True, check=True)


LEFT_OUT = {"mistral-common", "torchvision", "torchaudio", "torchcodec", "setuptools"}
"""Reasons: pyproject.toml."""


@pytest.mark.vllm
@NEEDS_VLLM[1]
def test_vllm_requirements_are_met():
    (build,) = metadata.packages_distributions()["vllm"]
    assert metadata.version(build) == "0.32.0"
    unmet = []
    for line in metadata.requires(build) or []:
        needed = Requirement(line)
        if needed.name.lower().replace("_", "-") in LEFT_OUT or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or version not in needed.specifier:
            unmet.append(f"{line} (installed: {version})")
    assert not unmet


def test_missing_vllm_names_the_target(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="`make vllm`"):
        VLLMEngine(8)
