"""Matrix products whose result is float32 whatever the matrices are."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product of two matrices, or of two batches of them, in float32; autocast has no effect on it.

    For what goes into a softmax: a result in bfloat16 is off by up to 0.06 at logits of 16, and by 0.25 at the scores of 50
    that large key biases give. A GPU computes it of bfloat16 matrices at full speed. A CPU casts them first: in float32 it
    multiplies small matrices several times faster than in bfloat16.

    Args:
        a: any floating dtype; rounded to that of `b` on a GPU.
        b: any floating dtype.
    """
    multiply = torch.mm if b.dim() == 2 else torch.bmm
    with torch.autocast(b.device.type, enabled=False):
        if b.device.type != "cuda" or b.dtype == torch.float32:
            return multiply(a.float(), b.float())
        return multiply(a.to(b.dtype), b, out_dtype=torch.float32)
