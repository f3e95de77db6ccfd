"""Collects a rollout batch: samples rationales of all roles, embeds them, and gathers over the ranks what rewards need, once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.distributed.ranks import Ranks
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.credit import from_tokens
from src.modules.objectives.roles import ids_of, same_texts, texts_of
from src.modules.policy.batching import embed_all, packed_batches
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool, pool_prefixes
from src.modules.policy.reference import Reference
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.engine import Request, RolloutEngine, generate_all
from src.modules.types import CONTEXT_ROLES, Embeddings, GreedyRollouts, PlainTexts, Role, RoleRollouts, RolloutBatch, Rollouts
from src.records import Triplet
from src.utils.timing import timed

STREAMS = {"positive": 0, "query": 3, "negative": 4}
CONTEXT_STREAM, GREEDY_STREAM = 1, 2
"""Streams of random numbers of a rollout batch."""


@dataclass(frozen=True)
class Collector:
    """Samples rollout batches with the weights as they are.

    Attributes:
        policy, engine, renderer, reference, algorithm: of the module; no reference if the algorithm has none.
        ranks: the processes that collect together, each its share of the instances.
        num_generations, temperature, context_temperature, also_learn_from, micro_batch_tokens, seed, distill_weight: see GRACE; with a
            weight above 0 texts are embedded without rationales as well.
    """

    policy: Policy
    engine: RolloutEngine
    renderer: PromptRenderer
    reference: Reference | None
    algorithm: Algorithm
    ranks: Ranks
    num_generations: int
    temperature: float
    context_temperature: float
    also_learn_from: Sequence[Role]
    micro_batch_tokens: int
    seed: int
    distill_weight: float = 0.0

    def collect(self, batch: Sequence[Triplet], number: int) -> RolloutBatch:
        """Samples K rollouts of each text of the roles that are learned from, and one of each text of the others.

        Args:
            batch: the instances of all ranks.
            number: of the batch; with the run's seed it determines what is drawn.

        Raises:
            ValueError: the batch cannot be shared evenly, or ranks were given different ones; records differ in their number of negatives;
                negatives are to be learned from and there are none.
        """
        ids = tuple(triplet.id for triplet in batch)
        self.ranks.require_same(ids)
        own = self.ranks.share(batch)
        m, seconds = negatives_per_instance(own), dict[str, float]()
        if "negative" in self.also_learn_from and not m:
            raise ValueError("module.also_learn_from names negatives, and the records have none: leave it out")
        learned: list[Role] = ["positive", *self.also_learn_from]
        context_roles = tuple(role for role in CONTEXT_ROLES if role not in learned and (role == "query" or m))
        texts = [texts_of(own, role) for role in context_roles]
        with timed(seconds, "rollout"):
            requests = [self._request([texts_of(own, role)], len(own), (number, STREAMS[role]), self.temperature) for role in learned]
            if texts:
                requests.append(self._request(texts, len(own), (number, CONTEXT_STREAM), self.context_temperature, n=1))
            if self.algorithm.greedy_baseline:
                requests += [self._request([texts_of(own, role)], len(own), (number, GREEDY_STREAM), 0.0, n=1) for role in learned]
            written = generate_all(self.engine, self.policy, requests)
        sampled = dict(zip(learned, written, strict=False))
        context = written[len(learned)] if texts else None
        with timed(seconds, "encode"):
            greedy = {}
            if self.algorithm.greedy_baseline:
                greedy = {role: self._greedy(part, len(own)) for role, part in zip(learned, written[-len(learned) :], strict=True)}
            encoded = {role: self._encode(rollouts) for role, rollouts in sampled.items()}
            first = {role: vectors.unflatten(0, (-1, self.num_generations))[:, 0] for role, (vectors, _, _) in encoded.items()}
            if context is not None:
                vectors = unit_vectors(self.policy, context, self.micro_batch_tokens)
                first |= zip(context_roles, vectors.split([len(part) for part in texts]), strict=True)
            plain = self._plain(sampled, context, context_roles, len(own)) if self.distill_weight else {}
        roles = {role: self._gather(own, role, part, *encoded[role], greedy.get(role), seconds) for role, part in sampled.items()}
        negative = first["negative"] if m else first["query"][:0]
        embeddings = Embeddings(
            query=self.ranks.gather(first["query"], len(own)),
            positive=roles["positive"].embeddings,
            negative=self.ranks.gather(negative.unflatten(0, (len(own), m)), len(own)),
            same=same_texts(batch, negative.device),
        )
        return RolloutBatch(
            roles=roles,
            embeddings=embeddings,
            context_roles=context_roles,
            context=context if context is None else context.tokens_alone(),
            instance_ids=ids,
            rollout_tokens=sum(int(part.rationale_lengths.sum()) for part in written),
            distinct_rationales=self._distinct(sampled["positive"], len(own)),
            seconds=seconds,
            plain=plain,
        )

    def _plain(
        self, sampled: dict[Role, Rollouts], context: Rollouts | None, context_roles: Sequence[Role], instances: int
    ) -> dict[Role, PlainTexts]:
        """Embeds the texts of all roles without rationales, by what the engine computed or by a pass."""
        first = {role: rollouts[torch.arange(0, len(rollouts), self.num_generations)] for role, rollouts in sampled.items()}
        if context is not None:
            counts = [instances if role == "query" else len(context) - instances * ("query" in context_roles) for role in context_roles]
            first |= zip(context_roles, [context[rows] for rows in torch.arange(len(context)).split(counts)], strict=True)
        found: dict[Role, PlainTexts] = {}
        for role, rollouts in first.items():
            texts = rollouts.prompts_alone()
            vectors = unit_vectors(self.policy, texts, self.micro_batch_tokens)
            found[role] = PlainTexts(texts.tokens_alone(), self.ranks.gather(vectors, instances))
        return found

    def _request(
        self, texts: Sequence[list[str]], instances: int, stream: tuple[int, int], temperature: float, n: int | None = None
    ) -> Request:
        """Returns a request for n rollouts (None: K) of the texts of some roles, role after role."""
        prompts = self.renderer([text for part in texts for text in part])
        # a seed for each text by its place among those of all ranks, so that the number of ranks changes nothing; a tuple of ints hashes to
        # the same number in every process
        sizes = [len(part) * self.ranks.count for part in texts]
        generator = torch.Generator().manual_seed(hash((self.seed, *stream)) % 2**31)
        drawn = torch.randint(2**62, (sum(sizes),), generator=generator)
        seeds = torch.cat([self.ranks.own(part, instances) for part in drawn.split(sizes)])
        k, prefixes = (self.num_generations, self.algorithm.gae_lambda is not None) if n is None else (n, False)
        return Request(prompts, k, temperature, seeds, prefixes)

    def _encode(self, rollouts: Rollouts) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns unit vectors [g*K, D], log-probs [g*K, T] and prefix vectors [g*K, R + 1, D], the last two None if not needed.

        What the engine computed while it sampled is used if it is complete; else one pass computes all of it.
        """
        algorithm, k = self.algorithm, self.num_generations
        with_logprobs, with_prefixes = algorithm.updates_per_batch > 1 or algorithm.kl_in_reward, algorithm.gae_lambda is not None
        # importance weights compare the engine's log-probs with the trainer's own
        logprobs = rollouts.logprobs if with_logprobs and algorithm.tis_cap is None else None
        pooled, prefixes = rollouts.embeddings, rollouts.prefix_embeddings if with_prefixes else None
        if pooled is None or (logprobs is None) == with_logprobs or (prefixes is None) == with_prefixes:
            longest, parts = int(rollouts.rationale_lengths.max()), []
            for rows in packed_batches(rollouts, torch.arange(len(rollouts)), k, self.micro_batch_tokens):
                part = rollouts[rows]
                hidden = self.policy.hidden_states(part, rows // k) if with_logprobs else None  # a live encoder reads them as well
                states = self.policy.encoder_states(part, hidden, rows // k)
                values = None if hidden is None else self.policy.logprobs(part, hidden, self.temperature)[0]
                if values is not None:
                    values = torch.nn.functional.pad(values, (0, rollouts.input_ids.shape[1] - values.shape[1]))
                cut = pool_prefixes(states, part, longest, self.policy.pooling) if with_prefixes else None
                parts.append((pool(states, part.pooling_mask, self.policy.pooling), values, cut))
            pooled = torch.cat([vectors for vectors, _, _ in parts])
            logprobs = torch.cat([values for _, values, _ in parts if values is not None]) if with_logprobs else None
            prefixes = torch.cat([cut for _, _, cut in parts if cut is not None]) if with_prefixes else None
        return normalize(pooled, dim=-1), logprobs, None if prefixes is None else normalize(prefixes, dim=-1)

    def _gather(
        self,
        own: Sequence[Triplet],
        role: Role,
        rollouts: Rollouts,
        vectors: Tensor,
        logprobs: Tensor | None,
        prefixes: Tensor | None,
        greedy: GreedyRollouts | None,
        seconds: dict[str, float],
    ) -> RoleRollouts:
        """Adds the reference's log-probs, and gathers over the ranks what rewards, shaping and credit need."""
        reference = divergence = None
        ids = ids_of(own, role)
        if self.reference is not None:
            with timed(seconds, "reference"):
                reference = self.reference.logprobs(rollouts, self.num_generations, self.micro_batch_tokens, self.temperature)
        if self.algorithm.kl_in_reward and logprobs is not None and reference is not None:
            divergence = from_tokens(self.algorithm.divergence(logprobs, reference, rollouts.rationale_mask), rollouts)

        def everywhere(values: Tensor) -> Tensor:
            return self.ranks.gather(values.unflatten(0, (len(ids), -1)), len(own))

        def padded(values: Tensor | None, last: bool) -> Tensor | None:
            """Gathers values [g*K, R, ...] of rationales, whose longest differs by rank; pads with the last one or with 0."""
            if values is None:
                return None
            columns = int(self.ranks.largest(values.shape[1])[0]) - values.shape[1]
            tail = values[:, -1:].expand(-1, columns, *values.shape[2:])
            return everywhere(torch.cat([values, tail if last else torch.zeros_like(tail)], dim=1))

        return RoleRollouts(
            rollouts=rollouts.tokens_alone(),
            instance_ids=ids,
            embeddings=everywhere(vectors),
            lengths=everywhere(rollouts.rationale_lengths),
            finished=everywhere(rollouts.finished),
            old_logprobs=logprobs,
            reference_logprobs=reference,
            divergence=padded(divergence, last=False),
            prefixes=padded(prefixes, last=True),
            greedy=greedy,
        )

    def _greedy(self, rollouts: Rollouts, instances: int) -> GreedyRollouts:
        vectors = unit_vectors(self.policy, rollouts, self.micro_batch_tokens)
        parts = (vectors, rollouts.rationale_lengths, rollouts.finished)
        return GreedyRollouts(*(self.ranks.gather(part.unsqueeze(1), instances) for part in parts))

    def _distinct(self, rollouts: Rollouts, instances: int) -> float:
        hashes = torch.tensor([hash(tuple(ids.tolist())) for ids in rollouts.rationales()])
        found = self.ranks.gather(hashes.view(instances, -1), instances)
        return len(found.unique()) / found.numel()


def unit_vectors(policy: Policy, rollouts: Rollouts, tokens: int) -> Tensor:
    """Returns [N, D] unit vectors of texts with one rollout each, from the engine, or else from passes of at most `tokens` tokens."""
    return normalize(embed_all(policy, rollouts, tokens) if rollouts.embeddings is None else rollouts.embeddings, dim=-1)


def negatives_per_instance(batch: Sequence[Triplet]) -> int:
    """Returns M of a batch.

    Raises:
        ValueError: its records differ in their number of negatives.
    """
    counts = {len(triplet.negatives) for triplet in batch}
    if len(counts) != 1:
        raise ValueError(
            f"a batch must have one number of negatives an instance, this one has {sorted(counts)} (first record: {batch[0].id})"
        )
    return counts.pop()
