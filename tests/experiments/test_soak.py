from pathlib import Path

import pytest

from experiments.soak import soak


def test_growth_is_the_slope_of_the_second_half() -> None:
    assert soak.growth([0.0, 50.0, 90.0, *(100.0 + 0.01 * step for step in range(3, 8))]) == pytest.approx(10.0)
    assert soak.growth([7.0] * 10) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_small_steps(tmp_path: Path) -> None:
    file = tmp_path / "memory.md"
    soak.main(["--steps", "120", "--output", str(file)])
    text = file.read_text()
    assert "# Memory over 120 steps" in text
    assert float(text.split("a thousand steps | ")[1].split(" MiB")[0]) < 100  # a leak of one batch's tensors a step is far more
    assert file.with_suffix(".png").stat().st_size > 1000
