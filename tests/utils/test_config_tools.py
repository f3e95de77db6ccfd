"""What configs ask of the machine, groups of configs as objects, and the estimate of a run's time."""

import logging
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from src.callbacks.progress import TimeEstimate
from src.modules.policy.model import Policy
from src.utils import machine
from src.utils.trainer import instantiate_all
from tests.callbacks.conftest import FewTriplets, make_module

FRACTION = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}


def test_groups_of_configs_are_instantiated_in_order() -> None:
    group = OmegaConf.create({"b": FRACTION, "off": None, "a": {**FRACTION, "numerator": 3}})
    assert [fraction.numerator for fraction in instantiate_all(group, "callbacks")] == [1, 3]
    assert len(instantiate_all(OmegaConf.create(FRACTION), "logger")) == 1
    assert instantiate_all(None, "logger") == instantiate_all(OmegaConf.create({}), "logger") == []


@pytest.mark.parametrize("entry", [{"numerator": 1}, "fractions.Fraction", 3])
def test_an_entry_without_target_is_named(entry: object) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.wrong has no _target_"):
        instantiate_all(OmegaConf.create({"wrong": entry}), "callbacks")


@pytest.mark.parametrize("gpu", [False, True])
def test_configs_choose_by_the_machine(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: gpu)
    machine.register_machine_resolvers()
    cfg = OmegaConf.create({"batches": "${cpu_or_gpu:8,150}", "precision": "${fast_precision:}"})
    assert (cfg.batches, cfg.precision) == ((150, "bf16-mixed") if gpu else (8, "32-true"))


def test_bfloat16_is_what_the_processor_says() -> None:
    if not torch.cuda.is_available():
        flags = torch.cpu.get_capabilities()
        assert machine.has_bfloat16() == bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def test_time_estimate_is_logged(tiny_policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, data = make_module(tiny_policy), FewTriplets(2)
    data.batch_size = 2  # type: ignore[attr-defined]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[TimeEstimate(evaluated_texts=10)], default_root_dir=tmp_path,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "src.callbacks.progress"]
    assert re.fullmatch(r"GRACE: 2 batches of 2 texts on .*CPU threads.*; about \d+ minutes, evaluation included: until \d\d:\d\d", line)
