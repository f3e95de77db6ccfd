"""The gradient of one minibatch, micro-batch by micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.algorithm import Algorithm
from src.modules.experience import Experience
from src.modules.kl import k3
from src.modules.logprob_gap import LogprobGap
from src.modules.non_finite import require_finite
from src.modules.policy import Policy
from src.modules.ranks import Ranks
from src.modules.scoring import micro_batches
from src.modules.sequences import blank


@dataclass(frozen=True)
class MinibatchPass:
    """How a minibatch goes through the policy: so many tokens at a time, at the sampling temperature.

    Attributes:
        backward: takes a scalar and adds its gradient up; told that it is the minibatch's last, it leaves every rank with the
            mean over the ranks of what they have added up.
        ranks: those that share the minibatch.
    """

    micro_batch_tokens: int
    temperature: float
    backward: Callable[[Tensor, bool], None]
    ranks: Ranks


def minibatch_gradient(
    policy: Policy, algorithm: Algorithm, experience: Experience | None, how: MinibatchPass, gap: LogprobGap | None = None
) -> dict[str, float]:
    """Adds up the gradient of the algorithm's loss over all groups of `experience`; the same whatever the micro-batches.

    Rollouts that are left out of the loss are not computed. What the loss is divided by is that of the groups of all ranks.
    Ranks with fewer micro-batches than others make up the number with passes that add nothing: where weights are cut, a pass
    needs every rank.

    Args:
        experience: this rank's; at least one rollout of all ranks' is kept, and has tokens.
        gap: takes in the log-probs of policy and engine, if given.

    Returns:
        Over the groups of all ranks: loss; and by token clip_share, approx_kl (to the sampling policy), entropy in nats, and,
        with a reference, reference_kl (k3).
    """
    ranks = how.ranks
    kept, lengths = (
        (torch.empty(0, dtype=torch.long),) * 2
        if experience is None
        else (
            experience.keep.flatten().nonzero().flatten().cpu(),
            experience.rollouts.rationale_lengths,
        )
    )
    everywhere, own = ranks.gather_uneven(lengths[kept])
    weights = torch.zeros(lengths.shape, device=lengths.device)
    weights[kept] = algorithm.aggregation(everywhere)[own]
    tokens = int(everywhere.sum())
    parts = [] if experience is None else list(micro_batches(experience.rollouts, kept, experience.keep.shape[1], how.micro_batch_tokens))
    passes = int(ranks.largest(len(parts))[0])
    sums = dict.fromkeys(["loss", "clip_share", "approx_kl", "entropy", *(["reference_kl"] if algorithm.kl_weight else [])], 0.0)
    for number in range(passes):
        last = number == passes - 1
        if experience is None or number >= len(parts):
            how.backward(0.0 * policy(blank(policy.pad_id).to(policy.device))[0].sum(), last)
            continue
        rows = parts[number]
        loss, seen = _one_pass(policy, algorithm, experience, rows, weights[rows], how, gap)
        if ranks.count == 1:  # of several, all stop at the gradient's norm: one that stopped here would leave the others waiting
            k = experience.keep.shape[1]
            require_finite(loss.detach(), [experience.instance_ids[group] for group in sorted({int(row) // k for row in rows})])
        how.backward(loss * ranks.count, last)  # as the mean over ranks is taken of what belongs to a sum
        sums["loss"] += float(loss.detach())
        for name, values in seen.items():
            sums[name] += float(values.sum() / tokens)
    return dict(zip(sums, ranks.total(*sums.values()), strict=True))


def _one_pass(
    policy: Policy,
    algorithm: Algorithm,
    experience: Experience,
    rows: Tensor,
    weights: Tensor,
    how: MinibatchPass,
    gap: LogprobGap | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rollouts, [n] int64 rows of the experience with weights [n], and what is seen of their tokens, [n, T] each."""
    part = experience.rollouts[rows]
    logprobs, entropy = policy(part, rows // experience.keep.shape[1], how.temperature)
    columns, mask = logprobs.shape[1], part.rationale_mask
    old, reference = (None if x is None else x[rows, :columns] for x in (experience.old_logprobs, experience.reference_logprobs))
    if gap is not None:
        gap.add(logprobs, part.logprobs, mask)
    result = algorithm.token_loss(
        logprobs, logprobs.detach() if old is None else old, experience.advantages[rows, :columns], mask, reference, part.logprobs
    )
    seen = {"clip_share": result.clipped, "approx_kl": result.kl, "entropy": entropy * mask}
    if reference is not None:
        seen["reference_kl"] = k3(logprobs.detach(), reference) * mask
    return (result.loss.sum(dim=1) * weights).sum(), seen
