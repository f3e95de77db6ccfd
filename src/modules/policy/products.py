"""Matrix products whose result is float32 whatever the matrices are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product of two batches of matrices in float32; autocast has no effect on it.

    For what goes into a softmax: a result in bfloat16 is off by up to 0.06 at logits of 16, and by 0.25 at the scores of 50
    that large key biases give. A GPU computes it of bfloat16 matrices at full speed. A CPU casts them first: in float32 it
    multiplies small matrices several times faster than in bfloat16.

    Args:
        a: any floating dtype; rounded to that of `b` on a GPU.
        b: any floating dtype.
    """
    with torch.autocast(b.device.type, enabled=False):
        if b.device.type != "cuda" or b.dtype == torch.float32:
            return torch.bmm(a.float(), b.float())
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)


@contextmanager
def cpu_products_rounded_to(dtype: torch.dtype) -> Iterator[None]:
    """Lets a CPU round the entries of large float32 matrices to bfloat16 in products, if that is `dtype`; sums stay float32.

    The result is that of a GPU's product of bfloat16 matrices with a float32 result, which torch does not have on a CPU. With AMX it takes
    0.4 of the time of float32; a processor without such instructions computes in float32. The setting is the process's, so no other
    thread may multiply meanwhile.
    """
    if dtype != torch.bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns [n, V] float32 logits of states [n, D] and output embeddings [V, D], which may be rounded to the states' dtype.

    Autocast has no effect. In bfloat16, logits of 16 to 32 would have steps of 0.125. On a CPU this is fastest with float32 weights.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.to(hidden.dtype).T, out_dtype=torch.float32)
        with cpu_products_rounded_to(hidden.dtype):
            return hidden.float() @ weight.float().T
