"""The default experiment walks the path that was recorded: whoever changes it in passing finds out here."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.golden import RECORD, trajectory


@pytest.fixture(autouse=True)
def no_config_left_over() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def test_five_steps_of_tiny_sup_are_those_that_were_recorded(tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for number, (now, then) in enumerate(zip(trajectory(tmp_path), recorded, strict=True)):
        advice = f"rollout batch {number}; if the change is meant, `python -m tests.golden` records the new path"
        assert now == pytest.approx(then, rel=1e-4, abs=1e-6), advice  # on-policy, the loss itself is rounding about 0
