"""The default experiment walks the path that was recorded: whoever changes it in passing finds out here."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.golden import RECORD, trajectory

ROUNDING = 2e-5
"""How far rounding may move a number, relative to it. A cosine of mean-pooled states is right to 1e-6 in float32 (16 times 2^-24).
The reward adds up cosines with weights of 2.4 in all and divides by 0.1: it is right to 2.4e-5, at a size of 1.4 or more. What
depends on many cosines or on many weights averages their errors. The most that another instruction set (SSE, AVX2, AVX-512) moved
any of these numbers was 7e-7. A thousandth more of the learning rate, of the decay of credit, or of a weight or the temperature of
the reward moves some of them by 1e-3."""


@pytest.fixture(autouse=True)
def no_config_left_over() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def test_tiny_sup_follows_the_record(tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for number, (now, then) in enumerate(zip(trajectory(tmp_path), recorded, strict=True)):
        advice = f"rollout batch {number}; if the change is meant, `python -m tests.golden` records the new path"
        assert now["exact"] == then["exact"], advice
        assert now["rounded"] == pytest.approx(then["rounded"], rel=ROUNDING, abs=0), advice
