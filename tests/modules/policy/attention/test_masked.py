"""Short attention of bfloat16 on a CPU: its gradient is that of float32."""

import pytest
import torch

from src.modules.policy.attention import masked
from src.modules.policy.attention.masked import causal_mask, masked_attention


@pytest.mark.parametrize("window", [None, 7])
def test_short_attention_with_a_gradient_is_computed_in_float32(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 30, 16), (2, 2, 30, 16), (2, 2, 30, 16)]
    inputs = [(2 * torch.randn(shape, generator=generator)).bfloat16().requires_grad_() for shape in shapes]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(shapes[0], generator=generator)
    visible = causal_mask(30, window, torch.device("cpu"))

    def off() -> float:
        """The largest distance of the gradients from those of float64, as a share of their length."""
        with torch.autocast("cpu", torch.bfloat16):
            output = masked_attention(*inputs, visible, 0.25)
        assert output.dtype == torch.bfloat16
        exact = torch.autograd.grad(masked_attention(*doubles, visible, 0.25), doubles, upstream.double())
        ours = torch.autograd.grad(output, inputs, upstream.bfloat16())
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))

    short = off()
    monkeypatch.setattr(masked, "_SHORT", 0)
    assert short < 0.5 * off()
    assert short < 0.004  # upstream, output and gradients are rounded to bfloat16
