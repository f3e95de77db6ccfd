import logging
import re

import pytest

from src.callbacks.floor import FloorDistance, phases_of
from src.modules.objectives.roles import texts_of
from src.modules.plan.memory import shape_of
from src.modules.plan.speed import reading
from src.modules.types import ROLES
from tests.callbacks.conftest import fit, make_contrastive, triplets


def test_one_line_after_some_batches(module, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(module, [FloorDistance(batches=3, card="h100"), FloorDistance(batches=3)], tmp_path, batches=5)
    (line,) = [record.message for record in caplog.records if record.name == "src.callbacks.floor"]  # without a card there is none
    pattern = r"after 3 batches: rollout [\d.]+ s, ([\d.]+) times; update [\d.]+ s, ([\d.]+) times the floor of a NVIDIA H100"
    assert all(float(times) > 1 for times in re.fullmatch(pattern, line).groups())


def test_phases_count_the_batch(module, tmp_path):
    fit(module, [], tmp_path, batches=1)
    prompts = [length for role in ROLES for length in module.renderer(texts_of(triplets(2), role)).lengths.tolist()]
    phases = phases_of(module, triplets(2), half=False)
    assert phases[0].flops == reading(shape_of(module.policy.model.config), prompts, 4).flops
    assert [phase.what for phase in phases] == ["reading the prompts", "writing the rationales", "updating"]


def test_other_training_has_none(tiny_policy, tmp_path):
    fit(make_contrastive(tiny_policy), [FloorDistance(batches=1, card="h100")], tmp_path, batches=1)


def test_unknown_card():
    with pytest.raises(ValueError, match=r"plan\.card=v100"):
        FloorDistance(card="v100")
