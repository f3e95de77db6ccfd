"""What evaluate.py's general abilities are compared with, and that what is missing is found before anything is scored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import evaluate
from src.evaluation.abilities import AbilityScore
from src.evaluation.starting_policy import starting_policy
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.loading import policy_files
from src.modules.policy.model import Policy
from src.utils.checkpoint_io import FolderCheckpoints
from tests.builders import small_policy
from tests.conftest import Compose

OFFLINE = ["abilities.tasks=offline", "abilities.packages=[networkx]", "abilities.count=8"]


def test_both_are_scored_on_the_device_that_is_asked_for(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(*OFFLINE, "~logger", "device=meta", config_name="evaluate")
    scored = []

    def run_abilities(policy: Policy, **_: object) -> dict[str, AbilityScore]:
        scored.append(policy.device)
        return {"task": AbilityScore("acc", True, (1.0, 0.0), (1.0, 1.0))}

    monkeypatch.setattr(evaluate, "run_abilities", run_abilities)
    settings: Any = None
    policies = {name: (small_policy(), settings) for name in ("base", "trained")}
    evaluate.report_abilities(cfg, policies, "base", Console(quiet=True))
    assert scored == [torch.device("meta")] * 2


def run_folder(folder: Path, policy_folder: Path, config: str) -> Path:
    """What training leaves: <run>/export and <run>/.hydra/config.yaml; the export."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    return Path(shutil.copytree(policy_folder, folder / "export"))


def test_an_export_began_with_the_policy_of_its_runs_config(tiny_policy_folder: Path, tmp_path: Path) -> None:
    export = run_folder(tmp_path / "run", tiny_policy_folder, f"paths: {{root: {tmp_path}}}\npolicy: {{path: '${{paths.root}}/start'}}\n")
    assert starting_policy(str(export), load_policy(export)[0]) == f"{tmp_path}/start"
    of_nothing = run_folder(tmp_path / "fresh", tiny_policy_folder, "policy: {vocab_size: 4096}\n")
    for unknown in (str(of_nothing), str(tiny_policy_folder), "someone/policy"):
        with pytest.raises(ValueError, match=r"which is not known here: name it by base=$"):
            starting_policy(unknown, load_policy(export)[0])


def test_a_checkpoint_says_what_it_began_with(compose: Compose, tiny_policy_folder: Path, tmp_path: Path) -> None:
    checkpoint, policy = tmp_path / "last.ckpt", Policy.load(str(tiny_policy_folder))
    FolderCheckpoints().save_checkpoint(of_training(policy), checkpoint)
    cfg = compose(*OFFLINE, f"model={checkpoint}", config_name="evaluate")
    pytest.importorskip("lm_eval")
    rows = evaluate.contenders(cfg.model, None, "shipped", tmp_path)
    policies, base = evaluate.load_policies(cfg, rows, "shipped")
    assert base == str(tiny_policy_folder)
    assert policies.keys() == {str(checkpoint), base}


def of_training(policy: Policy) -> dict[str, Any]:
    """The parts of a training checkpoint that make a policy again."""
    grace = {"policy_path": policy.path, "policy_files": policy_files(policy), "encoder": "live", "lora": None}
    weights = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    return {"state_dict": weights, "grace": {**grace, "settings": EncoderSettings().to_dict()}}


def stopped(compose: Compose, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """The one line in which evaluate.py ends before anything is scored."""
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(SystemExit) as caught:
        evaluate.evaluate(compose(*overrides, "~logger", "size=small", "packages.test=[networkx,rich]", config_name="evaluate"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_base_that_is_not_known_must_be_named(compose: Compose, tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    message = stopped(compose, monkeypatch, *OFFLINE, f"model={tiny_policy_folder}")
    assert message.startswith("evaluate.py: abilities.tasks compares ")
    assert message.endswith("name it by base=")


def test_a_base_that_is_gone_is_named(compose: Compose, tiny_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    export = run_folder(tmp_path / "run", tiny_policy_folder, "policy: {path: /gone/policy}\n")
    message = stopped(compose, monkeypatch, *OFFLINE, f"model={export}")
    assert message.startswith("evaluate.py: abilities are compared with a base, and no model at /gone/policy")
    assert message.endswith("base= names another")


def test_without_lm_eval_nothing_is_scored(compose: Compose, tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "lm-eval, which is not installed" in stopped(compose, monkeypatch, *OFFLINE, f"base={tiny_policy_folder}")


def test_an_unknown_task_is_named_before_anything_is_scored(
    compose: Compose, tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    message = stopped(compose, monkeypatch, "abilities.tasks=[gsm8k,nosuchtask]", f"base={tiny_policy_folder}")
    assert message == "evaluate.py: lm-eval has no task or group named nosuchtask: `lm-eval ls tasks` lists them"
