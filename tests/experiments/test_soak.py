import gc

import pytest
import torch

from experiments.soak import soak


def test_growth_is_the_later_slope():
    assert soak.growth([0.0, 50.0, 90.0, *(100.0 + 0.01 * step for step in range(3, 8))]) == pytest.approx(10.0)
    assert soak.growth([7.0] * 10) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_small_steps(tmp_path):
    file = tmp_path / "memory.md"
    soak.main(["--steps", "120", "--output", str(file)])
    text = file.read_text()
    assert "# Memory over 120 steps" in text
    # One step of the allocator, of several MiB, among the sixty samples is that much. So this finds a leak of a tenth of a MiB a
    # batch, such as a graph of activations; smaller ones are found by the test below and by a thousand steps.
    assert float(text.split("a thousand steps | ")[1].split(" MiB")[0]) < 100
    assert file.with_suffix(".png").stat().st_size > 1000


def tensors() -> float:
    """MiB of the tensors that are referenced."""
    gc.collect()
    held = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]  # isinstance would resolve lazy objects
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values()) / soak.MIB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_tensors_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "resident", tensors)
    samples, _ = soak.soak(40, "urllib3")
    # the ids and masks of a batch's twelve rollouts are some 15 kB, which would be 15 MiB in a thousand steps
    assert abs(soak.growth(samples)) < 1
