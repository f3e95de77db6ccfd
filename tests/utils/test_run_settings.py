"""What a run computes with, and what is said of it where a run goes on."""

import logging
from pathlib import Path

import pytest

from src.utils.run_settings import FILE, is_another, read_settings, settings_of, write_settings
from tests.conftest import Compose


def test_settings_are_what_a_run_computes_with(compose: Compose) -> None:
    begun = settings_of(compose("seed=3", "experiment=tiny_sup"))
    assert begun["seed"] == 3
    assert begun["module.num_generations"] == 8
    assert not [name for name in begun if name.startswith(("paths", "logger", "callbacks", "module.policy", "hydra"))]
    for same in ("trainer.devices=2", "module.micro_batch_tokens=7", "project=other", "trainer.max_epochs=9", "callbacks=minimal"):
        assert settings_of(compose("seed=3", "experiment=tiny_sup", same)) == begun
    for other in (
        "reward=paper",
        "algorithm.kl_coef=0.1",
        "module.num_generations=4",
        "datamodule.modules_per_batch=2",
        "policy.pooling=eos",
    ):
        assert settings_of(compose("seed=3", "experiment=tiny_sup", other)) != begun


def test_what_has_changed_is_said_once_and_makes_another_run_of_it_in_the_same_folder_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = str(tmp_path / "run" / "checkpoints" / "batch_4.ckpt")
    begun = {"seed": 0, "reward.hard": "mean", "packages": ["a"]}
    assert not is_another(begun, tmp_path / "run", checkpoint)  # an older run, which left none
    write_settings(tmp_path / "run", begun)
    with caplog.at_level(logging.WARNING):
        assert not is_another(begun, tmp_path / "run", None)
        assert not is_another({**begun, "packages": ("a",)}, tmp_path / "run", checkpoint)
        assert caplog.records == []
        assert is_another({**begun, "seed": 1, "reward.hard": "max"}, tmp_path / "run", checkpoint)
        assert not is_another({**begun, "seed": 1}, tmp_path / "branch", checkpoint)
    said = [record.message.partition(": ")[2] for record in caplog.records]
    assert said == ["reward.hard=max in place of mean; seed=1 in place of 0", "seed=1 in place of 0"]
    (tmp_path / "run" / FILE).write_text("{")
    assert read_settings(tmp_path / "run") is None
