"""Estimates of KL(policy || reference) from tokens that the policy drew (Schulman, http://joschu.net/blog/kl-approx.html).

Pure functions: log-probs of the drawn tokens under policy and reference, any shape -> the same shape. With r = pi_ref / pi:
the mean of k1 and of k3 is the divergence; k2 is biased and close to it. As a loss they differ more than as a number: the
gradient of k2 is, in the mean, that of the divergence; that of k3 is the divergence's the other way round; that of k1 is 0.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """-log r: unbiased, of high variance, negative for half of the tokens."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log r)^2 / 2: never negative."""
    return (reference - logprobs).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(r - 1) - log r: unbiased and never negative (the term of GRPO, arXiv 2402.03300, eq. 4)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
