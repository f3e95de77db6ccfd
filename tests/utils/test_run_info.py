"""What is recorded of a run, and which settings make it another run when it resumes."""

import json
import logging
import os
import subprocess
import sys

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from src.utils.data_contents import DataContents
from src.utils.mlflow_store import default_store
from src.utils.renamed_settings import RENAMED
from src.utils.run_info import description, git_state, hardware, log_run_info, package_versions, run_params
from src.utils.run_logger import flatten
from src.utils.run_settings import (
    FILE,
    changes,
    data_settings,
    read_settings,
    require_same_data,
    settings_changed,
    settings_of,
    write_settings,
)
from tests.conftest import ROOT


def test_flatten():
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]})) == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_git_state(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {"git.commit": "none: not a git repository"}

    def git(*arguments):
        user = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *user, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) == {"git.commit": "none: nothing committed yet"}
    git("commit", "--allow-empty", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (tmp_path / "new").write_text("x")
    assert git_state(tmp_path) == clean | {"git.dirty": "true"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"git.commit": "none: git is not installed"}


def test_versions_and_hardware():
    versions = package_versions(["torch", "no-such-package-here"])
    assert set(versions) == {"version.python", "version.torch"}
    assert int(hardware()["hardware.cores"]) >= 1


def test_missing_setting_is_an_error(tmp_path):
    with pytest.raises(MissingMandatoryValue, match="name"):
        log_run_info([], OmegaConf.create({"name": "???"}), tmp_path)


def test_runs_do_not_differ_in_places_of_their_folders():
    found = [run_params({"paths": {"output_dir": f"/runs/{n}"}, "callbacks": {"export": {"folder": f"/runs/{n}/export"}}}) for n in "ab"]
    assert found[0] == {"paths.output_dir": "/runs/a", "callbacks.export.folder": "${paths.output_dir}/export"}
    assert found[1] == found[0] | {"paths.output_dir": "/runs/b"}


def test_description_says_what_it_is(compose):
    cfg = compose()
    note = description(cfg, DataContents("texts.txt", "/data/texts.txt", "", 1250), "GRACE of `a/policy`")
    assert note.splitlines() == [
        "GRACE of `a/policy`  ",
        "Data: texts.txt, 1,250 records (/data/texts.txt)  ",
        f"Folder: `{cfg.paths.output_dir}`",
    ]


@pytest.mark.parametrize("uri", ["http://host:5000", None])
def test_store_is_that_of_the_environment_where_no_setting_is_given(monkeypatch, uri):
    own = f"sqlite:///{ROOT}/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        assert hydra_compose("train").logger.tracking_uri == default_store() == (uri or own)
        assert hydra_compose("train", ["paths.tracking_uri=sqlite:///mine.db"]).logger.tracking_uri == "sqlite:///mine.db"


def test_empty_variable_is_unset():
    code = "import os, src.utils.run_logger, src.utils.mlflow_store as m; print(os.environ.get('MLFLOW_TRACKING_URI'), m.default_store())"
    environment = os.environ | {"MLFLOW_TRACKING_URI": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", f"sqlite:///{ROOT}/mlflow.db"]


# ---- settings


def test_settings_are_those_that_change_results(compose):
    base = settings_of(compose("seed=3", "experiment=tiny_sup"))
    assert (base["seed"], base["module.num_generations"]) == (3, 8)
    assert not [name for name in base if name.startswith(("paths", "logger", "callbacks", "module.policy", "hydra"))]
    for same in ("trainer.devices=2", "module.micro_batch_tokens=7", "project=other", "trainer.max_epochs=9", "callbacks=minimal"):
        assert settings_of(compose("seed=3", "experiment=tiny_sup", same)) == base
    others = ("reward=paper", "algorithm.kl_coef=0.1", "module.num_generations=4", "datamodule.modules_per_batch=2", "policy.pooling=eos")
    for other in others:
        assert settings_of(compose("seed=3", "experiment=tiny_sup", other)) != base


def test_changed_settings_make_another_run(tmp_path, caplog):
    checkpoint, run = str(tmp_path / "run" / "checkpoints" / "batch_4.ckpt"), tmp_path / "run"
    base = {"seed": 0, "reward.hard_reduction": "mean", "packages": ["a"]}
    assert not settings_changed(base, run, checkpoint)  # an older run, which saved none
    write_settings(run, base)
    with caplog.at_level(logging.WARNING):
        assert not settings_changed(base, run, None)
        assert not settings_changed({**base, "packages": ("a",)}, run, checkpoint)
        assert caplog.records == []
        assert settings_changed({**base, "seed": 1, "reward.hard_reduction": "max"}, run, checkpoint)
        assert not settings_changed({**base, "seed": 1}, tmp_path / "branch", checkpoint)
    said = [record.message.partition(": ")[2] for record in caplog.records]
    assert said == ["reward.hard_reduction=max in place of mean; seed=1 in place of 0", "seed=1 in place of 0"]
    (run / FILE).write_text("{")
    assert read_settings(run) is None


@pytest.mark.parametrize("value", [None, 0, 0.0, False, "", [], {}, "none"])
def test_new_setting_that_is_off_is_no_change(tmp_path, value):
    before = {"seed": 0, "algorithm.kl_coef": 0.1, "algorithm.gae_lambda": None}
    now = {**before, "module.new_term": value}
    assert changes(before, now) == changes(now, before) == []
    write_settings(tmp_path, before)
    assert not settings_changed(now, tmp_path, str(tmp_path / "checkpoints" / "last.ckpt"))
    assert changes(before, {**before, "module.new_term": 0.5}) == ["module.new_term=0.5 in place of None"]
    off = {**before, "algorithm.kl_coef": value, "algorithm.gae_lambda": 0.0}  # both name them: null and 0 may differ
    assert len(changes(before, off)) == 2


def test_data_under_the_same_settings_must_be_the_same(tmp_path):
    checkpoint, base = str(tmp_path / "checkpoints" / "last.ckpt"), {"seed": 0, "datamodule.path": "a.txt"}
    data = {"data.digest": "aa", "data.records": 200}
    write_settings(tmp_path, base)  # of an earlier version, which knew no data
    require_same_data(base | data, checkpoint, allowed=False)
    assert not settings_changed(base | data, tmp_path, checkpoint)
    write_settings(tmp_path, base | data)
    require_same_data(base | data, checkpoint, allowed=False)
    other = base | {"data.digest": "bb", "data.records": 250, "seed": 1}
    require_same_data(other, None, allowed=False)  # a new run
    require_same_data(other | {"datamodule.path": "b.txt"}, checkpoint, allowed=False)  # as the command says
    require_same_data(other, checkpoint, allowed=True)
    with pytest.raises(
        RuntimeError, match=r"\(data.digest=bb in place of aa; data.records=250 in place of 200\): .* allow_changed_data=true$"
    ):
        require_same_data(other, checkpoint, allowed=False)
    with pytest.raises(RuntimeError, match="the training data is not what"):  # other settings do not say that the data is another
        require_same_data(other | {"datamodule.batch_size": 8}, checkpoint, allowed=False)
    for named in ("revision", "files", "columns.text", "_target_", "train_packages"):
        require_same_data(other | {f"datamodule.{named}": "new"}, checkpoint, allowed=False)
    assert settings_changed(other, tmp_path, checkpoint)


def test_data_is_known_by_its_content(tmp_path, compose):
    file = tmp_path / "texts.txt"

    def found(*overrides):
        cfg = compose("datamodule=wiki1m", f"datamodule.path={file}", "module.max_prompt_tokens=96", *overrides)
        return data_settings(instantiate(cfg.datamodule).contents())

    file.write_text("one sentence\nanother sentence\n")
    first = found()
    assert first["data.records"] == 2
    assert found("module.max_prompt_tokens=90") == first  # other places, the same data
    file.write_text("one sentence\nanother sentence.\n")
    assert found()["data.digest"] != first["data.digest"]
    docstrings = [
        data_settings(instantiate(compose(f"packages.train=[{name}]").datamodule).contents()) for name in ("urllib3", "urllib3", "rich")
    ]
    assert docstrings[0] == docstrings[1] != docstrings[2]
    assert data_settings(None) == {}


def test_renamed_settings_are_no_change(compose):
    now = settings_of(compose("experiment=smollm2_sup", "reward=listwise", "reward@module.pathwise_reward=listwise"))
    old_name = {new: old for old, new in RENAMED.items()}
    old_name |= {
        new.replace("reward", "module.pathwise_reward"): old.replace("reward", "module.pathwise_reward") for new, old in old_name.items()
    }
    before = {old_name.get(name, name): value for name, value in now.items()}
    before |= {"reward._target_": "src.modules.rewards.listwise", "rollout._target_": "src.modules.rollout_hf.HFRollouts"}
    assert "module.num_rollouts" in before
    assert "module.pathwise_reward.query_weight" in before
    assert changes(before, now) == []
    before["module.num_rollouts"] += 1
    assert changes(before, now) == [f"module.num_generations={now['module.num_generations']} in place of {before['module.num_rollouts']}"]


def test_settings_without_effect_are_no_change_of_an_older_run(compose):
    now = settings_of(compose("experiment=tiny_sup"))
    old = json.loads((ROOT / "tests" / "utils" / "settings_of_an_older_run.json").read_text())  # of tiny_sup, as version 51fb5c1 wrote it
    old["policy.path"] = now["policy.path"]
    assert changes(old, now) == ["algorithm.advantage._target_=src.modules.objectives.advantages.rloo in place of grpo"]
    with_vllm = changes(old, settings_of(compose("experiment=tiny_sup", "rollout=vllm")))
    assert any(line.startswith("algorithm.tis_cap=auto") for line in with_vllm)
