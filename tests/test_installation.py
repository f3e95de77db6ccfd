"""vLLM is installed without its dependencies; those that it needs must be installed too."""

import importlib.util
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from src.modules.rollouts.vllm import VLLMEngine
from tests.vllm_builders import NEEDS_VLLM

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
