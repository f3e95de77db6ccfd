"""Config values that depend on the machine, and instantiated groups of configs."""

import pytest
import torch
from omegaconf import OmegaConf

from src.utils import machine
from src.utils.instantiate import instantiate_all

FRACTION = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}


def test_groups_of_configs_are_instantiated_in_order():
    group = OmegaConf.create({"b": FRACTION, "off": None, "a": {**FRACTION, "numerator": 3}})
    assert [fraction.numerator for fraction in instantiate_all(group, "callbacks")] == [1, 3]
    assert len(instantiate_all(OmegaConf.create(FRACTION), "logger")) == 1
    assert instantiate_all(None, "logger") == instantiate_all(OmegaConf.create({}), "logger") == []


@pytest.mark.parametrize("entry", [{"numerator": 1}, "fractions.Fraction", 3])
def test_entry_without_target_is_named(entry):
    with pytest.raises(ValueError, match=r"callbacks\.wrong has no _target_"):
        instantiate_all(OmegaConf.create({"wrong": entry}), "callbacks")


@pytest.mark.parametrize("gpu", [False, True])
def test_configs_choose_by_the_machine(gpu, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: gpu)
    machine.register_machine_resolvers()
    cfg = OmegaConf.create({"batches": "${cpu_or_gpu:8,150}", "precision": "${fast_precision:}"})
    assert (cfg.batches, cfg.precision) == ((150, "bf16-mixed") if gpu else (8, "32-true"))


def test_bfloat16_is_what_the_processor_says():
    if not torch.cuda.is_available():
        flags = torch.cpu.get_capabilities()
        assert machine.has_bfloat16() == bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
