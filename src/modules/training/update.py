"""Updates the policy on the experience of one rollout batch: minibatches, micro-batches, gradients, optimiser steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from src.modules.distributed.fsdp import global_dot
from src.modules.distributed.ranks import Ranks
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import k3
from src.modules.objectives.pathwise import pathwise_loss
from src.modules.policy.batching import packed_batches
from src.modules.policy.model import Policy
from src.modules.training.experience import Context, Experience
from src.modules.training.finite import require_finite
from src.modules.types import Rollouts, dummy_rollouts

FIRST_STEP_ALONE = (
    *("logprob_mismatch_mean", "logprob_mismatch_max"),
    *("score_function_grad_norm", "pathwise_grad_norm", "gradient_parts_cosine"),
)
"""Metrics of the first step of a batch, which are not means over steps."""


@dataclass(frozen=True)
class Minibatch:
    """This rank's part of one optimiser step: groups and context, each None if it has none.

    `pathwise_scale` is the factor of the losses that move embeddings (pathwise and distillation), which are sums over instances; `first`
    says that it is of the first step of its batch.
    """

    experience: Experience | None
    context: Context | None
    pathwise_scale: float
    first: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """The loss of some sequences, and what is logged of the algorithm's part of it.

    Attributes:
        loss: scalar with a graph.
        values: sums over tokens of clip_fraction, approx_kl, entropy and kl_to_reference; and the algorithm's loss.
        mismatch: [n] absolute differences, in nats, of the trainer's log-probs from those that the engine reports.
        instance_ids: of the sequences.
    """

    loss: Tensor
    values: dict[str, Tensor]
    mismatch: Tensor
    instance_ids: list[str]


@dataclass(frozen=True)
class Updater:
    """Takes the optimiser steps of a rollout batch. All ranks call its methods together.

    Attributes:
        temperature: of sampling, which log-probs are taken at.
        micro_batch_tokens: most tokens in one forward and backward pass, a prompt counted once for its rationales.
        score_function_weight: factor of the algorithm's loss; at 0 it is not computed.
        embeds: whether embeddings are moved, by the derivatives that come with experience and context.
        measure_parts: whether the first step logs the norms of both parts of the gradient and their cosine; the pathwise part is all that
            moves embeddings.
        backward: takes a scalar and accumulates its gradient; with True, the minibatch's last, every rank is left with the mean over the
            ranks of what they have accumulated.
        take_step: takes the record ids of a minibatch; clips, checks and applies the gradient; returns its norm.
    """

    policy: Policy
    algorithm: Algorithm
    ranks: Ranks
    temperature: float
    micro_batch_tokens: int
    score_function_weight: float
    embeds: bool
    measure_parts: bool
    backward: Callable[[Tensor, bool], None]
    take_step: Callable[[Sequence[str]], float]

    def update(self, experience: Experience | None, context: Context | None, instances: int) -> dict[str, float]:
        """Takes `updates_per_batch` steps, each on its share of the groups of all ranks; a step without anything to learn is left out.

        Args:
            experience, context: this rank's.
            instances: of the rollout batch, of all ranks.

        Returns:
            Means over the steps of what `_statistics` returns and of grad_norm; updates, the number of steps; groups, how many
            they learned from. Log-prob mismatches are those of the first step, whose policy is still the one that the engine sampled from.
        """
        sums, once = dict[str, float](), dict[str, float]()
        steps, groups = 0, 0 if experience is None else len(experience)
        for minibatch in self._minibatches(experience, context, instances):
            ids = () if minibatch.experience is None else minibatch.experience.instance_ids
            if not self.ranks.total(self._size(minibatch))[0]:
                continue  # all masked out, still gathering groups, or more updates than groups
            minibatch = replace(minibatch, first=steps == 0)
            stats = self.accumulate_gradients(minibatch) if steps or not self.measure_parts else self._accumulate_in_parts(minibatch)
            of_first = {name: stats.pop(name) for name in FIRST_STEP_ALONE if name in stats}
            once = once if steps else of_first
            stats["grad_norm"] = self.take_step(ids)
            sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
            steps += 1
        means = {name: value / steps for name, value in sums.items()}
        return {**means, **once, "updates": float(steps), "groups": self.ranks.total(groups)[0]}

    def _minibatches(self, experience: Experience | None, context: Context | None, instances: int) -> Iterator[Minibatch]:
        count, groups = self.algorithm.updates_per_batch, 0 if experience is None else len(experience)
        # the pathwise loss is a sum over instances, of which each step has its share: this makes it their mean
        scale = self.embeds * min(count, groups) / instances
        shares = torch.arange(instances // self.ranks.count).tensor_split(count)
        for own, share in zip(torch.arange(groups).tensor_split(count), shares, strict=True):
            part = experience.select(own) if experience is not None and len(own) else None
            yield Minibatch(part, None if context is None else context.select(share), scale)

    def _size(self, minibatch: Minibatch) -> int:
        """Returns what this rank has to learn from: tokens, and with a pathwise term embeddings."""
        groups, context = minibatch.experience, minibatch.context
        embedded = (0 if groups is None else len(groups)) + (0 if context is None else len(context)) if minibatch.pathwise_scale else 0
        return embedded + (0 if groups is None else groups.tokens)

    def accumulate_gradients(self, minibatch: Minibatch) -> dict[str, float]:
        """Accumulates the gradient of a minibatch's loss; the same whatever the micro-batches and the number of ranks.

        Returns:
            What `_statistics` returns.
        """
        weights, tokens = self._token_weights(minibatch.experience)
        passes = list(self._passes(minibatch, weights))
        count = self._passes_of_all_ranks(len(passes), minibatch)
        done: list[MicroBatch] = []
        for number in range(count):
            last = number == count - 1
            if number >= len(passes):
                embeddings = self.policy(dummy_rollouts(self.policy.pad_id).to(self.policy.device))[0]
                self.backward(0.0 * embeddings.sum(), last)
                continue
            part = passes[number]()
            if self.ranks.count == 1:  # of several, all stop at the gradient's norm: one that stopped here would leave the others waiting
                require_finite(part.loss.detach(), part.instance_ids)
            # the loss is a sum over the micro-batches of all ranks, and backward leaves each rank with the ranks' mean
            self.backward(part.loss * self.ranks.count, last)
            done.append(replace(part, loss=part.loss.detach()))
        return self._statistics(done, tokens)

    def _token_weights(self, experience: Experience | None) -> tuple[Tensor, int]:
        """Returns [g*K] float32, the weights of each rollout's tokens in the algorithm's loss, and the number of kept tokens of all ranks.

        The algorithm's aggregation sees the kept rollouts of all ranks; rollouts that are not kept have the weight 0.
        """
        kept = torch.empty(0, dtype=torch.long) if experience is None else experience.keep.flatten().nonzero().flatten().cpu()
        lengths = kept if experience is None else experience.rollouts.rationale_lengths
        of_all_ranks, this_rank = self.ranks.gather_uneven(lengths[kept])
        weights = torch.zeros(lengths.shape, device=lengths.device)
        weights[kept] = self.algorithm.aggregation(of_all_ranks)[this_rank]
        return weights, max(int(of_all_ranks.sum()), 1)

    def _passes_of_all_ranks(self, own: int, minibatch: Minibatch) -> int:
        """Returns how many passes each rank makes: with sharded weights a pass needs every rank, so those with fewer add empty ones."""
        count = int(self.ranks.largest(own)[0])
        # Gradients are exchanged as the last pass meets each weight. A pass for embeddings alone meets neither the output layer nor what
        # follows an inner layer; one more empty pass meets all.
        extra = count > 0 and self.ranks.count > 1 and minibatch.pathwise_scale != 0
        return count + int(extra)

    def _statistics(self, done: Sequence[MicroBatch], tokens: int) -> dict[str, float]:
        """Returns the statistics of a minibatch over all ranks.

        Returns:
            loss, the algorithm's; and by token clip_fraction, approx_kl (to the sampling policy), entropy in nats, with a reference
            kl_to_reference (k3), and logprob_mismatch_mean and _max where the engine reports log-probs. Empty without the algorithm's loss.
        """
        names = ["loss", "clip_fraction", "approx_kl", "entropy", *(["kl_to_reference"] if self.algorithm.kl_coef else [])]
        sums = dict.fromkeys(names if self.score_function_weight else [], 0.0)
        for part in done:
            for name, value in part.values.items():
                sums[name] += float(value / (1 if name == "loss" else tokens))
        differences = [part.mismatch for part in done if len(part.mismatch)]
        own = sum(float(part.sum()) for part in differences), sum(len(part) for part in differences)
        *totals, mismatch, tokens_compared = self.ranks.total(*sums.values(), *own)
        found = dict(zip(sums, totals, strict=True))
        if tokens_compared:
            largest = self.ranks.largest(max((float(part.max()) for part in differences), default=-1.0))[0]
            found |= {"logprob_mismatch_mean": mismatch / tokens_compared, "logprob_mismatch_max": largest}
        return found

    def _accumulate_in_parts(self, minibatch: Minibatch) -> dict[str, float]:
        """Accumulates the same gradient part by part, with one more copy of it in memory.

        Returns:
            What `_statistics` returns; and score_function_grad_norm, pathwise_grad_norm and gradient_parts_cosine.
        """
        stats = self.accumulate_gradients(replace(minibatch, context=None, pathwise_scale=0.0))
        before = {p: None if p.grad is None else p.grad.clone() for p in self.policy.parameters()}
        replace(self, score_function_weight=0.0).accumulate_gradients(minibatch)
        squares, product = [0.0, 0.0], 0.0
        for p, earlier in before.items():
            if p.grad is not None:
                first = torch.zeros_like(p.grad) if earlier is None else earlier
                second = p.grad - first
                squares = [squares[0] + global_dot(first, first), squares[1] + global_dot(second, second)]
                product += global_dot(first, second)
        norms = [math.sqrt(square) for square in squares]
        cosine = product / max(norms[0] * norms[1], 1e-30)
        return {**stats, "score_function_grad_norm": norms[0], "pathwise_grad_norm": norms[1], "gradient_parts_cosine": cosine}

    def _passes(self, minibatch: Minibatch, weights: Tensor) -> Iterator[Callable[[], MicroBatch]]:
        """Yields the micro-batches of groups that have a part in the loss, then those of context."""
        experience, context, embeds = minibatch.experience, minibatch.context, minibatch.pathwise_scale != 0
        if experience is not None:
            needed = weights.cpu() > 0 if self.score_function_weight else torch.zeros(len(weights), dtype=torch.bool)
            if embeds and experience.embedding_gradients is not None:  # 0 of a role without part, and of all but a query's first
                needed |= experience.embedding_gradients.any(dim=1).cpu()
            rows = needed.nonzero().flatten()
            for part in packed_batches(experience.rollouts, rows, experience.keep.shape[1], self.micro_batch_tokens):
                yield partial(self.micro_batch_loss, minibatch, experience, part, weights[part])
        if context is not None and embeds:
            for part in packed_batches(context.rollouts, torch.arange(len(context)), 1, self.micro_batch_tokens):
                yield partial(self._context_loss, context, part, minibatch.pathwise_scale)

    def micro_batch_loss(self, minibatch: Minibatch, experience: Experience, rows: Tensor, weights: Tensor) -> MicroBatch:
        """Computes the loss of some rollouts: the algorithm's, weighted, and the pathwise one.

        Args:
            experience: of the minibatch.
            rows: [n] int64, of the experience.
            weights: [n] of their tokens in the algorithm's loss.
        """
        part, k = experience.rollouts[rows], experience.keep.shape[1]
        derivatives = None
        if experience.embedding_gradients is not None and minibatch.pathwise_scale and experience.embedding_gradients[rows].any():
            derivatives = experience.embedding_gradients[rows]
        scored = self.score_function_weight != 0
        logprobs, entropy, embeddings = self.policy(part, rows // k, self.temperature, logprobs=scored, embeddings=derivatives is not None)
        ids = [experience.instance_ids[group] for group in sorted({int(row) // k for row in rows})]
        result = MicroBatch(weights.new_zeros(()), {}, weights.new_zeros(0), ids)
        if scored:
            result = self._algorithm_loss(experience, rows, part, weights, logprobs, entropy, minibatch.first, ids)
        if derivatives is not None:
            result = replace(result, loss=result.loss + minibatch.pathwise_scale * pathwise_loss(embeddings, derivatives))
        return result

    def _algorithm_loss(
        self,
        experience: Experience,
        rows: Tensor,
        part: Rollouts,
        weights: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        first: bool,
        ids: list[str],
    ) -> MicroBatch:
        """Computes `score_function_weight` times the algorithm's loss of some rollouts, `part`, whose log-probs are [n, T] with a graph."""
        mask, groups = part.rationale_mask, rows // experience.keep.shape[1]
        columns = mask.shape[1]
        old, reference = (None if x is None else x[rows, :columns] for x in (experience.old_logprobs, experience.reference_logprobs))
        tokens = self.algorithm.token_loss(
            logprobs,
            logprobs.detach() if old is None else old,
            experience.advantages[rows, :columns],
            mask,
            reference=reference,
            engine=part.logprobs,
            entropy=entropy,
            groups=groups,
        )
        loss = (tokens.loss.sum(dim=1) * weights).sum()
        mismatch = weights.new_zeros(0)
        if first and part.logprobs is not None:
            mismatch = (logprobs.detach() - part.logprobs).abs()[mask]
        logged = mask & (weights > 0).unsqueeze(1)  # rollouts that are left out of the loss are not logged
        values = {"clip_fraction": tokens.clipped, "approx_kl": tokens.kl, "entropy": entropy}
        if reference is not None:
            values["kl_to_reference"] = k3(logprobs.detach(), reference)
        sums = {"loss": loss.detach(), **{name: (value * logged).sum() for name, value in values.items()}}
        return MicroBatch(self.score_function_weight * loss, sums, mismatch, ids)

    def _context_loss(self, context: Context, rows: Tensor, pathwise_scale: float) -> MicroBatch:
        _, _, embeddings = self.policy(context.rollouts[rows], rows, logprobs=False, embeddings=True)
        loss = pathwise_scale * pathwise_loss(embeddings, context.gradients[rows])
        ids = [f"query or negative of instance {i}" for i in context.instances[rows].tolist()]
        return MicroBatch(loss, {}, loss.detach().new_zeros(0), ids)
