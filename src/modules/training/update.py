"""The gradient of one minibatch, micro-batch by micro-batch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from src.modules.distributed.fsdp import global_dot
from src.modules.distributed.ranks import Ranks
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.kl import k3
from src.modules.policy.attention.shared_prompt import micro_batches
from src.modules.policy.model import Policy
from src.modules.training.experience import Experience
from src.modules.training.logprob_mismatch import LogprobMismatch
from src.modules.training.non_finite import require_finite
from src.modules.training.pathwise import Companions, pathwise_loss
from src.modules.types import dummy_rollouts


@dataclass(frozen=True)
class MinibatchPass:
    """How a minibatch goes through the policy: so many tokens at a time, at the sampling temperature.

    Attributes:
        backward: takes a scalar and adds its gradient up; told that it is the minibatch's last, it leaves every rank with the
            mean over the ranks of what they have added up.
        ranks: those that share the minibatch.
        score_function_scale: factor of the algorithm's loss; at 0 no log-probs are computed.
        pathwise_scale: factor of the derivative of the rewards in the embeddings, which is summed over instances; at 0 nothing is embedded.
    """

    micro_batch_tokens: int
    temperature: float
    backward: Callable[[Tensor, bool], None]
    ranks: Ranks
    score_function_scale: float = 1.0
    pathwise_scale: float = 0.0


Pass = Callable[[], tuple[Tensor, dict[str, Tensor], list[str]]]
"""Computes the loss of a micro-batch; what is seen of its tokens, [n, T] each; and the records it is of."""


def accumulate_gradients(
    policy: Policy,
    algorithm: Algorithm,
    experience: Experience | None,
    how: MinibatchPass,
    gap: LogprobMismatch | None = None,
    companions: Companions | None = None,
) -> dict[str, float]:
    """Adds up the gradient of the algorithm's loss and of the pathwise term; the same whatever the micro-batches.

    What the algorithm's loss is divided by is that of the groups of all ranks. Rollouts that are left out of that loss are passed
    only where the pathwise term needs their embeddings.
    Ranks with fewer micro-batches than others make up the number with passes that add nothing: where weights are cut, a pass
    needs every rank.

    Args:
        experience: this rank's.
        gap: takes in the log-probs of policy and engine, if given.
        companions: this rank's queries and negatives with a part in the pathwise term alone.

    Returns:
        Over the groups of all ranks: loss, the algorithm's; and by token clip_fraction, approx_kl (to the sampling policy), entropy in
        nats, and, with a reference, kl_to_reference (k3). Nothing where `how` leaves the algorithm's loss out.
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
    tokens = max(int(everywhere.sum()), 1)
    passes = list(_passes(policy, algorithm, experience, companions, weights, kept, how, gap))
    count = int(ranks.largest(len(passes))[0])
    if count and ranks.count > 1 and how.pathwise_scale != 0:
        # gradients are exchanged as the last pass meets each weight, and one for embeddings alone does not meet the output layer, nor
        # what follows an inner layer: one more pass that adds nothing meets all
        count += 1
    names = ["loss", "clip_fraction", "approx_kl", "entropy", *(["kl_to_reference"] if algorithm.kl_coef else [])]
    sums = dict.fromkeys(names if how.score_function_scale else [], 0.0)
    for number in range(count):
        last = number == count - 1
        if number >= len(passes):
            how.backward(0.0 * _nothing(policy), last)
            continue
        loss, seen, records = passes[number]()
        if ranks.count == 1:  # of several, all stop at the gradient's norm: one that stopped here would leave the others waiting
            require_finite(loss.detach(), records)
        how.backward(loss * ranks.count, last)  # as the mean over ranks is taken of what belongs to a sum
        for name, values in seen.items():
            sums[name] += float(values.sum() / (1 if name == "loss" else tokens))
    return dict(zip(sums, ranks.total(*sums.values()), strict=True))


def gradient_in_parts(
    policy: Policy,
    algorithm: Algorithm,
    experience: Experience | None,
    how: MinibatchPass,
    gap: LogprobMismatch | None,
    companions: Companions | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Adds up the same gradient in two passes, and measures its two parts; the arguments are those of `accumulate_gradients`.

    It needs one more copy of the gradient.

    Returns:
        What `accumulate_gradients` returns; and score_function_grad_norm, pathwise_grad_norm and gradient_parts_cosine.
    """
    stats = accumulate_gradients(policy, algorithm, experience, replace(how, pathwise_scale=0.0), gap)
    before = {p: None if p.grad is None else p.grad.clone() for p in policy.parameters()}
    accumulate_gradients(policy, algorithm, experience, replace(how, score_function_scale=0.0), None, companions)
    squares_first, squares_second, product = 0.0, 0.0, 0.0
    for p, earlier in before.items():
        if p.grad is not None:
            first = torch.zeros_like(p.grad) if earlier is None else earlier
            second = p.grad - first
            squares_first += global_dot(first, first)
            squares_second += global_dot(second, second)
            product += global_dot(first, second)
    norms = math.sqrt(squares_first), math.sqrt(squares_second)
    cosine = product / max(norms[0] * norms[1], 1e-30)
    return stats, {"score_function_grad_norm": norms[0], "pathwise_grad_norm": norms[1], "gradient_parts_cosine": cosine}


def _nothing(policy: Policy) -> Tensor:
    """A scalar from a pass of the policy that means nothing."""
    logprobs, _, _ = policy(dummy_rollouts(policy.pad_id).to(policy.device))
    return logprobs.sum()


def _passes(
    policy: Policy,
    algorithm: Algorithm,
    experience: Experience | None,
    companions: Companions | None,
    weights: Tensor,
    kept: Tensor,
    how: MinibatchPass,
    gap: LogprobMismatch | None,
) -> Iterator[Pass]:
    """Yields the micro-batches of groups, then those of companions."""
    embeds = how.pathwise_scale != 0
    if experience is not None:
        needed = torch.zeros(len(weights), dtype=torch.bool)
        if how.score_function_scale != 0:
            needed[kept] = True
        if embeds and experience.embedding_gradients is not None:  # 0 of a side that takes no part, and of all but a query's first
            needed |= experience.embedding_gradients.any(dim=1).cpu()
        for part in micro_batches(experience.rollouts, needed.nonzero().flatten(), experience.keep.shape[1], how.micro_batch_tokens):
            yield partial(_group_pass, policy, algorithm, experience, part, weights[part], how, gap)
    if companions is not None and embeds:
        for part in micro_batches(companions.rollouts, torch.arange(len(companions)), 1, how.micro_batch_tokens):
            yield partial(_companion_pass, policy, companions, part, how)


def _companion_pass(
    policy: Policy, companions: Companions, rows: Tensor, how: MinibatchPass
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    part = companions.rollouts[rows]
    _, _, embeddings = policy(part, rows, logprobs=False, embeddings=True)
    loss = how.pathwise_scale * pathwise_loss(embeddings, companions.gradients[rows])
    return loss, {}, [f"query or negative of instance {i}" for i in companions.instances[rows].tolist()]


def _group_pass(
    policy: Policy,
    algorithm: Algorithm,
    experience: Experience,
    rows: Tensor,
    weights: Tensor,
    how: MinibatchPass,
    gap: LogprobMismatch | None,
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """The loss of some rollouts, [n] int64 rows of the experience with weights [n] in the algorithm's loss."""
    part, k = experience.rollouts[rows], experience.keep.shape[1]
    gradients = None if experience.embedding_gradients is None or how.pathwise_scale == 0 else experience.embedding_gradients[rows]
    if gradients is not None and not gradients.any():
        gradients = None
    scores, embeds = how.score_function_scale != 0, gradients is not None
    logprobs, entropy, embeddings = policy(part, rows // k, how.temperature, logprobs=scores, embeddings=embeds)
    loss = weights.new_zeros(())
    seen: dict[str, Tensor] = {}
    if scores:
        own, seen = _algorithm_loss(algorithm, experience, rows, weights, logprobs, entropy, gap)
        loss = loss + how.score_function_scale * own
    if gradients is not None:
        loss = loss + how.pathwise_scale * pathwise_loss(embeddings, gradients)
    return loss, seen, [experience.instance_ids[group] for group in sorted({int(row) // k for row in rows})]


def _algorithm_loss(
    algorithm: Algorithm,
    experience: Experience,
    rows: Tensor,
    weights: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    gap: LogprobMismatch | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The algorithm's loss of some rollouts from their log-probs and entropies, [n, T] each, and what is seen of their tokens."""
    part = experience.rollouts[rows]
    columns, mask = logprobs.shape[1], part.rationale_mask
    old, reference = (None if x is None else x[rows, :columns] for x in (experience.old_logprobs, experience.reference_logprobs))
    if gap is not None:
        gap.add(logprobs, part.logprobs, mask)
    result = algorithm.token_loss(
        logprobs, logprobs.detach() if old is None else old, experience.advantages[rows, :columns], mask, reference, part.logprobs
    )
    loss = (result.loss.sum(dim=1) * weights).sum()
    mask = mask & (weights > 0).unsqueeze(1)  # of what is left out of the loss, nothing is seen
    seen = {"loss": loss.detach(), "clip_fraction": result.clipped * mask, "approx_kl": result.kl * mask, "entropy": entropy * mask}
    if reference is not None:
        seen["kl_to_reference"] = k3(logprobs.detach(), reference) * mask
    return loss, seen
