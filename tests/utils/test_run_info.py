import subprocess
from pathlib import Path

import mlflow
import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from src.utils.run_info import flatten, git_state, hardware, log_run_info, package_versions
from src.utils.run_logger import RunLogger


def test_flatten() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]})) == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_git_state_says_what_it_found(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"git.commit": "none: not a git repository"}

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
        )

    git("init")
    assert git_state(tmp_path) == {"git.commit": "none: nothing committed yet"}
    git("commit", "--allow-empty", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (tmp_path / "new").write_text("x")
    assert git_state(tmp_path) == clean | {"git.dirty": "true"}


def test_git_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"git.commit": "none: git is not installed"}


def test_versions_and_hardware() -> None:
    versions = package_versions(["torch", "no-such-package-here"])
    assert set(versions) == {"version.python", "version.torch"}
    assert int(hardware()["hardware.cores"]) >= 1


def test_a_run_holds_its_config_and_no_password(tracking_uri: str, tmp_path: Path) -> None:
    logger = RunLogger("run_info", tracking_uri=tracking_uri, artifact_location=f"file://{tmp_path}/artifacts")
    cfg = OmegaConf.create({"paths": {"tracking_uri": "http://me:pw@host", "root": "/r", "out": "${.root}/out"}, "seed": 3})
    log_run_info([logger], cfg, tmp_path)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params == {"paths.tracking_uri": "http://me:***@host", "paths.root": "/r", "paths.out": "/r/out", "seed": "3"}
    assert run.data.tags["git.commit"] == "none: not a git repository"
    assert "version.torch" in run.data.tags
    mlflow.set_tracking_uri(tracking_uri)
    artifact = mlflow.artifacts.load_text(f"runs:/{logger.run_id}/config.yaml")
    assert yaml.safe_load(artifact)["paths"] == {"tracking_uri": "http://me:***@host", "root": "/r", "out": "/r/out"}


def test_a_config_with_a_hole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingMandatoryValue, match="name"):
        log_run_info([], OmegaConf.create({"name": "???"}), tmp_path)
