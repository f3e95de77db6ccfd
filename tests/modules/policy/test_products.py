"""Products on a CPU whose entries are rounded to bfloat16 and whose sums are not."""

import pytest
import torch

from src.modules.policy.products import cpu_products_rounded_to, logits_of


def test_logits_of_bfloat16_states_add_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(40, 64, generator=generator).bfloat16()
    weight = torch.randn(500, 64, generator=generator).bfloat16().float()  # exact in bfloat16
    logits, exact = logits_of(hidden, weight), hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert exact.abs().max() > 64
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=2e-4)  # bfloat16 has steps of 0.5 there


def product_that_fails() -> None:
    with cpu_products_rounded_to(torch.bfloat16):
        assert fp32_precision() == "bf16"
        raise ValueError("within")


def fp32_precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def test_setting_comes_back() -> None:
    before = fp32_precision()
    with pytest.raises(ValueError, match="within"):
        product_that_fails()
    assert fp32_precision() == before
    with cpu_products_rounded_to(torch.float32):
        assert fp32_precision() == before
