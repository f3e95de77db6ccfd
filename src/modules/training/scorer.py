"""One batch up to its rewards: rollouts of all sides, their embeddings, and what an update will need of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.distributed.ranks import Ranks
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.judging import Greedy
from src.modules.objectives.rewards import Embeddings
from src.modules.objectives.roles import CONTEXT_ROLES, Role, ids_of, texts_of
from src.modules.policy.model import Policy
from src.modules.policy.reference import GroupEncoding, Reference
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.scoring import (
    Scored,
    ScoredSide,
    encode_groups,
    encode_others,
    negatives_an_instance,
    sampled_tokens,
)
from src.modules.types import Rollouts
from src.records import Triplet
from src.utils.timing import timed

_STREAMS = {"positive": 0, "query": 3, "negative": 4}
_ONE_EACH, _GREEDY = 1, 2  # streams of random numbers beside those of the groups


@dataclass(frozen=True)
class Scorer:
    """Samples and scores one rollout batch with the weights as they are.

    Attributes:
        policy, engine, renderer, reference, algorithm: of the module; no reference where the algorithm has no use for it.
        settings: the module's: num_generations, temperature, context_temperature, micro_batch_tokens, encode_batch_size,
            also_learn_from.
        seed: tells this rollout batch from others: the run's seed, the batch's number.
        ranks: the processes that score the batch together, each its share of it.
        seconds: takes in the time of the phases.
    """

    policy: Policy
    engine: RolloutEngine
    renderer: PromptRenderer
    reference: Reference | None
    algorithm: Algorithm
    settings: dict[str, Any]
    seed: tuple[int, int]
    ranks: Ranks
    seconds: dict[str, float]

    def score(self, batch: Sequence[Triplet]) -> Scored:
        """K rollouts of the sides that are learned from, one of each text of the others.

        Args:
            batch: this rank's share, as of all methods here.

        Raises:
            ValueError: the records differ in their number of negatives; negatives are to be learned from and there are none.
        """
        m = negatives_an_instance(batch)
        learned = self._learned(m)
        rest = [side for side in CONTEXT_ROLES if side not in learned and (side == "query" or m)]
        with timed(self.seconds, "rollout"):
            groups = {side: self._groups(batch, side) for side in learned}
            texts = [texts_of(batch, side) for side in rest]
            others = [self._roll_out(texts, len(batch), 1, self.settings["context_temperature"], _ONE_EACH)] if rest else []
        with timed(self.seconds, "encode"):
            sides = {side: self._side(rollouts, ids_of(batch, side)) for side, rollouts in groups.items()}
            ones = {side: scored.embeddings[:, 0] for side, scored in sides.items()}  # other sides meet the first rollout
            for rollouts in others:
                embedded = normalize(encode_others(self.policy, rollouts, self.settings["encode_batch_size"]), dim=-1)
                ones |= zip(rest, embedded.split([len(texts_of(batch, side)) for side in rest]), strict=True)
        if self.reference is not None:
            with timed(self.seconds, "reference"):
                for side, rollouts in groups.items():
                    sides[side] = replace(sides[side], reference_logprobs=self.reference.logprobs(rollouts, self._encoding))
        negative = ones["negative"] if m else ones["query"][:0]
        own = (ones["query"], sides["positive"].embeddings, negative.unflatten(0, (len(batch), m)))
        embeddings = Embeddings(*(self.ranks.gather(side, len(batch)) for side in own))
        one_each = (tuple(rest), others[0]) if others else None
        return Scored(sides, embeddings, sampled_tokens(*groups.values(), *others), one_each)

    def greedy(self, batch: Sequence[Triplet], side: Role) -> Greedy:
        """One greedy rollout of each text of a side."""
        with timed(self.seconds, "greedy"):
            rollouts = self._roll_out([texts_of(batch, side)], len(batch), 1, 0.0, _GREEDY)
            embedded = encode_others(self.policy, rollouts, self.settings["encode_batch_size"])
        lengths, finished = rollouts.rationale_lengths.unsqueeze(1), rollouts.finished.unsqueeze(1)
        return Greedy(normalize(embedded, dim=-1).unsqueeze(1), lengths, finished)

    def _learned(self, negatives: int) -> list[Role]:
        also: list[Role] = list(self.settings["also_learn_from"])
        if "negative" in also and not negatives:
            raise ValueError("module.also_learn_from names negatives, and the records have none: leave it out")
        return ["positive", *also]

    @property
    def _encoding(self) -> GroupEncoding:
        s = self.settings
        return GroupEncoding(s["num_generations"], s["micro_batch_tokens"], s["temperature"])

    def _side(self, rollouts: Rollouts, instance_ids: tuple[str, ...]) -> ScoredSide:
        algorithm = self.algorithm
        # importance weights compare the engine's log-probs with the trainer's own
        own = rollouts if algorithm.tis_cap is None else replace(rollouts, logprobs=None)
        with_logprobs = algorithm.updates_per_batch > 1 or algorithm.kl_in_reward
        encoded = encode_groups(self.policy, own, self._encoding, with_logprobs, with_prefixes=algorithm.gae_lambda is not None)
        by_text = (len(instance_ids), self.settings["num_generations"])
        cut = encoded.prefix_embeddings
        if cut is not None:  # a reward of prefixes looks at the others' of the same length, too
            columns = int(self.ranks.largest(cut.shape[1])[0])
            cut = torch.cat([cut, cut[:, -1:].expand(-1, columns - cut.shape[1], -1)], dim=1)
        return ScoredSide(
            rollouts=rollouts,
            embeddings=normalize(encoded.embeddings, dim=-1).unflatten(0, by_text),
            old_logprobs=encoded.logprobs,
            reference_logprobs=None,
            prefixes=None if cut is None else normalize(cut, dim=-1).unflatten(0, by_text),
            instance_ids=instance_ids,
        )

    def _groups(self, batch: Sequence[Triplet], side: Role) -> Rollouts:
        k, prefixes = self.settings["num_generations"], self.algorithm.gae_lambda is not None
        return self._roll_out([texts_of(batch, side)], len(batch), k, self.settings["temperature"], _STREAMS[side], prefixes)

    def _roll_out(
        self, sides: Sequence[list[str]], instances: int, n: int, temperature: float, stream: int, prefixes: bool = False
    ) -> Rollouts:
        """n rollouts of the texts of some sides of so many instances, one side behind the other."""
        prompts = self.renderer([text for texts in sides for text in texts])
        seeds = self._seeds(stream, [len(texts) for texts in sides], instances)
        return self.engine.generate(self.policy, prompts, n=n, temperature=temperature, seed=seeds, prefixes=prefixes)

    def _seeds(self, stream: int, sizes: Sequence[int], instances: int) -> Tensor:
        """One for each text, by its place among those of all ranks: ranks differ, and their number changes nothing."""
        whole = [size * self.ranks.count for size in sizes]
        places = torch.cat([sum(whole[:i]) + self.ranks.places(size, instances) for i, size in enumerate(sizes)])
        # a tuple of ints hashes to the same number in every process
        generator = torch.Generator().manual_seed(hash((*self.seed, stream)) % 2**31)
        return torch.randint(2**62, (sum(whole),), generator=generator)[places]
