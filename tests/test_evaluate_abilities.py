"""General abilities in evaluate.py: the policy they are compared with, and errors before anything is scored."""

import shutil
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console

import evaluate
from src.evaluation import setup
from src.evaluation.abilities import AbilityScore
from src.evaluation.comparison import contenders, starting_policy
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.files import policy_files
from src.modules.policy.model import Policy
from src.utils.checkpoint_io import FolderCheckpoints
from tests.builders import small_policy
from tests.conftest import Compose
from tests.runs import mlflow_runs

OFFLINE = ["abilities.tasks=offline", "abilities.packages=[networkx]", "abilities.count=8"]


def test_abilities_are_compared_with_the_base(compose, tiny_policy_folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    trained = Path(shutil.copytree(tiny_policy_folder, tmp_path / "export"))
    small = ["size=small", "packages.test=[networkx,rich]", "rationale=false"]
    cfg = compose(*OFFLINE, *small, f"base={tiny_policy_folder}", f"model={trained}", config_name="evaluate")
    evaluate.evaluate(cfg)
    assert "General abilities of export beside" in capsys.readouterr().out
    assert "| docstring_choice | acc |" in Path(cfg.paths.output_dir, "abilities_export.md").read_text()
    client = MlflowClient(cfg.paths.tracking_uri)
    (run,) = [run for run in mlflow_runs(client, cfg.project) if run.info.run_name == "evaluate: abilities of export"]
    assert run.data.metrics["abilities/docstring_text/gain"] == 0.0  # the same weights


def test_both_are_scored_on_the_named_device(compose, monkeypatch):
    cfg = compose(*OFFLINE, "~logger", "device=meta", config_name="evaluate")
    scored = []

    def run_abilities(policy, **_):
        scored.append(policy.device)
        return {"task": AbilityScore("acc", True, (1.0, 0.0), (1.0, 1.0))}

    monkeypatch.setattr(setup, "run_abilities", run_abilities)
    policies = {name: (small_policy(), None) for name in ("base", "trained")}
    setup.report_abilities(cfg, policies, "base", Console(quiet=True))
    assert scored == [torch.device("meta")] * 2


def run_folder(folder: Path, policy_folder: Path, config: str) -> Path:
    """Makes what training leaves, <run>/export and <run>/.hydra/config.yaml; returns the export."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    return Path(shutil.copytree(policy_folder, folder / "export"))


def test_starting_policy_of_an_export(tiny_policy_folder, tmp_path):
    export = run_folder(tmp_path / "run", tiny_policy_folder, f"paths: {{root: {tmp_path}}}\npolicy: {{path: '${{paths.root}}/start'}}\n")
    assert starting_policy(str(export), load_policy(export)[0]) == f"{tmp_path}/start"
    of_nothing = run_folder(tmp_path / "fresh", tiny_policy_folder, "policy: {vocab_size: 4096}\n")
    for unknown in (str(of_nothing), str(tiny_policy_folder), "someone/policy"):
        with pytest.raises(ValueError, match=r"name it by base=$"):
            starting_policy(unknown, load_policy(export)[0])


def test_starting_policy_of_a_checkpoint(compose, tiny_policy_folder, tmp_path):
    pytest.importorskip("lm_eval")
    checkpoint, policy = tmp_path / "last.ckpt", Policy.load(str(tiny_policy_folder))
    grace = {"policy_path": policy.path, "policy_files": policy_files(policy), "encoder": "live", "lora": None}
    weights = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    saved = {"state_dict": weights, "grace": {**grace, "settings": EncoderSettings().to_dict()}}
    FolderCheckpoints().save_checkpoint(saved, checkpoint)
    cfg = compose(*OFFLINE, f"model={checkpoint}", config_name="evaluate")
    policies, base = setup.load_policies(cfg, contenders(cfg.model, None, "shipped", tmp_path), "shipped")
    assert base == str(tiny_policy_folder)
    assert policies.keys() == {str(checkpoint), base}


def stopped(compose: Compose, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """Returns the one line in which evaluate.py ends before anything is scored."""
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(SystemExit) as caught:
        evaluate.evaluate(compose(*overrides, "~logger", "size=small", "packages.test=[networkx,rich]", config_name="evaluate"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_base_must_be_named(compose, tiny_policy_folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    message = stopped(compose, monkeypatch, *OFFLINE, f"model={tiny_policy_folder}")
    assert message.startswith("evaluate.py: abilities.tasks compares ")
    assert message.endswith("name it by base=")
    export = run_folder(tmp_path / "run", tiny_policy_folder, "policy: {path: /gone/policy}\n")
    message = stopped(compose, monkeypatch, *OFFLINE, f"model={export}")
    assert "no model at /gone/policy" in message
    assert message.endswith("base= names another")


def test_missing_package_or_task(compose, tiny_policy_folder, monkeypatch):
    pytest.importorskip("lm_eval")
    base = f"base={tiny_policy_folder}"
    message = stopped(compose, monkeypatch, "abilities.tasks=[gsm8k,nosuchtask]", base)
    assert message == "evaluate.py: lm-eval has no task or group named nosuchtask: `lm-eval ls tasks` lists them"
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    message = stopped(compose, monkeypatch, *OFFLINE, base)
    assert "lm-eval, which is not installed" in message
    assert "[abilities]" in message
