"""The gradient of one minibatch, micro-batch by micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.algorithm import Algorithm
from src.modules.experience import Experience
from src.modules.kl import k3
from src.modules.logprob_gap import LogprobGap
from src.modules.policy import Policy
from src.modules.scoring import micro_batches


@dataclass(frozen=True)
class MinibatchPass:
    """How a minibatch goes through the policy: so many tokens at a time, at the sampling temperature.

    Attributes:
        backward: takes a scalar and adds its gradient up.
    """

    micro_batch_tokens: int
    temperature: float
    backward: Callable[[Tensor], None]


def minibatch_gradient(
    policy: Policy, algorithm: Algorithm, experience: Experience, how: MinibatchPass, gap: LogprobGap | None = None
) -> dict[str, float]:
    """Adds up the gradient of the algorithm's loss over all groups of `experience`; the same whatever the micro-batches.

    Rollouts that are left out of the loss are not computed.

    Args:
        experience: at least one rollout of it is kept, and has tokens.
        gap: takes in the log-probs of policy and engine, if given.

    Returns:
        loss; and by token clip_share, approx_kl (to the sampling policy), entropy in nats, and, with a reference,
        reference_kl (k3).
    """
    k = experience.keep.shape[1]
    kept = experience.keep.flatten().nonzero().flatten().cpu()
    lengths = experience.rollouts.rationale_lengths
    weights = torch.zeros(lengths.shape, device=lengths.device)
    weights[kept] = algorithm.aggregation(lengths[kept])
    tokens = int(lengths[kept].sum())
    sums: dict[str, float] = {}
    for rows in micro_batches(experience.rollouts, kept, k, how.micro_batch_tokens):
        part = experience.rollouts[rows]
        hidden = policy.hidden_states(part, rows // k)
        logprobs, entropy = policy.logprobs(part, hidden, how.temperature)
        columns, mask = logprobs.shape[1], part.rationale_mask
        old, reference = (None if x is None else x[rows, :columns] for x in (experience.old_logprobs, experience.reference_logprobs))
        if gap is not None:
            gap.add(logprobs, part.logprobs, mask)
        result = algorithm.token_loss(
            logprobs, logprobs.detach() if old is None else old, experience.advantages[rows, :columns], mask, reference, part.logprobs
        )
        loss = (result.loss.sum(dim=1) * weights[rows]).sum()
        how.backward(loss)
        seen = {"clip_share": result.clipped, "approx_kl": result.kl, "entropy": entropy * mask}
        if reference is not None:
            seen["reference_kl"] = k3(logprobs.detach(), reference) * mask
        for name, value in {"loss": loss.detach(), **{name: values.sum() / tokens for name, values in seen.items()}}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
