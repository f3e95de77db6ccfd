"""GRACE: rationales are sampled, embeddings rewarded, and the policy moves towards rationales that embed well.

batch -> rollouts -> embeddings, log-probs -> reward terms -> advantages -> loss -> steps
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from src.modules.distributed.fsdp import gradient_exchange, shard, whole
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.judging import Judged, RoleReward, by_token, judge
from src.modules.objectives.rewards import RewardFunction, without_autocast
from src.modules.objectives.roles import CONTEXT_ROLES, Role, ids_of, standing_in
from src.modules.policy.model import Policy
from src.modules.policy.reference import Reference
from src.modules.policy_module import PolicyModule
from src.modules.rollouts.checks import require_readable
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.dynamic_sampling import GroupBuffer, shared_out
from src.modules.training.experience import Experience, concatenate, interleaving
from src.modules.training.logprob_mismatch import LogprobMismatch
from src.modules.training.non_finite import NonFiniteError
from src.modules.training.pathwise import SIDES, Companions, PathwiseTerm, check_weights, companions_of, first_of_group, reward_gradients
from src.modules.training.report import step_report
from src.modules.training.scorer import Scorer
from src.modules.training.scoring import Scored
from src.modules.training.update import MinibatchPass, accumulate_gradients, gradient_in_parts
from src.records import Triplet
from src.utils.timing import timed


class GRACE(PolicyModule):
    """Trains a policy by the contrastive rewards of its rationales (Sun et al., arXiv 2510.04506).

    One `training_step` is one rollout batch: K rationales for each positive, one for each query and negative, rewards,
    advantages within groups, and `algorithm.updates_per_batch` optimiser steps on the positives' rationale tokens.
    Queries and negatives can be learned from as well.

    Args:
        policy: writes the rationales, and embeds.
        engine: samples them.
        reward: Embeddings -> Reward.
        algorithm: see Algorithm.
        score_function_weight: of the algorithm's loss, whose gradient says which rationales are written; 1 as published.
        pathwise_weight: of the derivative of the mean reward in the embeddings, whose gradient says how what is written is embedded (see
            training/pathwise.py); 0 as published. The derivative is taken once a rollout batch, at the embeddings of the policy that
            sampled, and held over its updates; each update embeds anew. All rollouts take part, those left out of the algorithm's loss
            too.
        pathwise_roles: whose embeddings are moved: `positive`, `query`, `negative`.
        pathwise_reward: Embeddings -> Reward, what the embeddings are moved by; None: `reward`.
        gradient_parts_every_n_rollout_batches: how often the first update takes one more pass, to log the norms of both parts of the
            gradient and the cosine between them; 0: never.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        num_generations: K.
        temperature, context_temperature: of sampling; the second for queries and negatives.
        also_learn_from: `query`, `negative` or both: K rollouts of these too, at the positives' temperature, each rewarded by
            what it does for its instance (see `standing_in`); none as published.
        micro_batch_tokens: most tokens in one forward and backward pass, a prompt counted once for its rationales.
        encode_batch_size: sequences in one encode pass of queries and negatives.
        learning_rate, warmup_steps, weight_decay: AdamW; linear warm-up over optimiser steps, then constant.
        max_grad_norm: gradients are scaled down to it.
        seed: of the rollouts; each batch and side draws its own stream from it, whatever the number of processes.

    Raises:
        ValueError: num_generations < 2, as a group of one has no baseline; a temperature, a side, a weight or a size without sense; a
            pathwise term with a frozen encoder, which nothing moves, or with an algorithm that leaves groups out.
    """

    unit = "rollout batch"

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        reward: RewardFunction,
        algorithm: Algorithm,
        instruction: str,
        max_prompt_tokens: int = 1024,
        template_kwargs: dict[str, str] | None = None,
        num_generations: int = 8,
        temperature: float = 1.0,
        context_temperature: float = 0.5,
        also_learn_from: Sequence[Role] | None = (),
        micro_batch_tokens: int = 8192,
        encode_batch_size: int = 64,
        learning_rate: float = 1e-6,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        score_function_weight: float = 1.0,
        pathwise_weight: float = 0.0,
        pathwise_roles: Sequence[Role] | None = SIDES,
        pathwise_reward: RewardFunction | None = None,
        gradient_parts_every_n_rollout_batches: int = 10,
    ) -> None:
        super().__init__(policy, engine, instruction, max_prompt_tokens, template_kwargs, rationale=True)
        if num_generations < 2:
            raise ValueError(
                f"module.num_generations={num_generations}: a group of one rollout has no baseline to be better than; use 2 or more"
            )
        if temperature <= 0 or context_temperature < 0:
            raise ValueError(
                f"module.temperature={temperature}, module.context_temperature={context_temperature}: the first must be "
                "above 0, as greedy rollouts do not differ; the second may be 0 (greedy)"
            )
        also_learn_from = tuple(map(str, also_learn_from or ()))  # type: ignore[arg-type]  # plain, to be kept in checkpoints
        if unknown := set(also_learn_from) - set(CONTEXT_ROLES):
            raise ValueError(
                f"module.also_learn_from={list(also_learn_from)}: {', '.join(sorted(unknown))} is not one of {', '.join(CONTEXT_ROLES)}"
            )
        for name, value in (("micro_batch_tokens", micro_batch_tokens), ("encode_batch_size", encode_batch_size)):
            if value < 1:
                raise ValueError(f"module.{name}={value}: it must be at least 1")
        if gradient_parts_every_n_rollout_batches < 0:
            raise ValueError(
                f"module.gradient_parts_every_n_rollout_batches={gradient_parts_every_n_rollout_batches}: use 0 (never) or more"
            )
        pathwise_roles = tuple(map(str, pathwise_roles or ()))  # type: ignore[arg-type]  # plain, to be kept in checkpoints
        check_weights(score_function_weight, pathwise_weight, pathwise_roles, policy, algorithm)
        self.save_hyperparameters(ignore=["policy", "engine", "reward", "algorithm", "template_kwargs", "pathwise_reward"])
        self.reward, self.algorithm = without_autocast(reward), algorithm
        self.pathwise_by_reward = pathwise_reward is None
        self.pathwise_reward = without_autocast(pathwise_reward or reward)
        self.reference = Reference(policy) if algorithm.kl_coef else None
        self.buffer = GroupBuffer(algorithm.min_group_std, algorithm.max_extra_batches)

    def setup(self, stage: str) -> None:
        """Refuses what would train wrongly in silence, as PolicyModule does; several processes train together."""
        super().setup(stage)
        require_readable(self.policy)  # before its weights are cut
        if self.ranks.count > 1:  # adapters were drawn alike; dropout, where there is any, is not to be
            torch.manual_seed(hash((self.hparams["seed"], self.global_rank)) % 2**31)

    def configure_model(self) -> None:
        """Cuts the policy's weights over the processes, under a strategy for that."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.policy, self.trainer.strategy.device_mesh["data_parallel"])

    # ---- one rollout batch

    def training_step(self, batch: list[Triplet], batch_idx: int) -> None:
        seconds: dict[str, float] = {}
        ranks = self.ranks
        ranks.require_same(ids_of(batch, "positive"))
        share = ranks.share(batch)  # of the whole batch, which every rank is given
        self.policy.eval()
        with torch.no_grad(), whole(self.policy):
            scorer = self.scorer(seconds)
            scored = scorer.score(share)
            reward = self.reward(scored.embeddings)
            self._require_finite({**reward.terms, "total": reward.total}, ids_of(batch, "positive"))
            judged = {side: self._judge(batch, share, scorer, scored, side) for side in scored.sides}
            pathwise = self._pathwise(scored, len(batch)) if self.hparams["pathwise_weight"] else None
            experiences = {side: self._experience(scored, side, judged[side], pathwise) for side in scored.sides}
        order = interleaving([len(part) for part in experiences.values()])
        rewards = torch.cat([part.rewards for part in judged.values()])[order]
        ready = self.buffer.add(concatenate(list(experiences.values())).select(order), rewards, ranks)
        self.policy.train()
        gap = LogprobMismatch()
        with timed(seconds, "update"):
            update = self.update(ready, gap, pathwise)
        self.rollout_batches += 1
        advantages, names = experiences["positive"].advantages, ids_of(batch, "positive")
        self.report = step_report(scored, reward, judged, advantages, ready, update, gap, seconds, ranks, names)

    def scorer(self, seconds: dict[str, float]) -> Scorer:
        """Samples and scores the next rollout batch."""
        seed = (self.hparams["seed"], self.rollout_batches)
        parts = (self.policy, self.engine, self.renderer, self.reference, self.algorithm)
        return Scorer(*parts, dict(self.hparams), seed, self.ranks, seconds)

    def _reward_of(self, scored: Scored, side: Role) -> RoleReward:
        """Of this rank's rollouts of a side, among the texts of all ranks."""
        return self.ranks.on_whole(standing_in(self.reward, scored.embeddings, side), len(scored.positive.instance_ids))

    def _judge(self, batch: Sequence[Triplet], share: Sequence[Triplet], scorer: Scorer, scored: Scored, side: Role) -> Judged:
        greedy = scorer.greedy(share, side) if self.algorithm.greedy_baseline else None
        judged = judge(self.algorithm, self._reward_of(scored, side), scored.sides[side], greedy)
        self._require_finite({f"{side} rollouts": self.ranks.gather(judged.earned, len(share))}, ids_of(batch, side))
        return judged

    def _pathwise(self, scored: Scored, instances: int) -> PathwiseTerm:
        """The derivative of the rewards of the whole batch in this rank's embeddings; `instances` is B of all ranks."""
        sides, k = self.hparams["pathwise_roles"], self.hparams["num_generations"]
        found, mean = reward_gradients(self.pathwise_reward, scored.embeddings, sides)
        own = len(scored.positive.instance_ids)
        rows = {side: self.ranks.own(getattr(found, side).flatten(0, -2), own) for side in SIDES}
        learned = {side: rows[side] if side == "positive" else first_of_group(rows[side], k) for side in scored.sides}
        return PathwiseTerm(learned, companions_of(scored.others, rows, sides, own), instances, mean)

    def _experience(self, scored: Scored, side: Role, judged: Judged, pathwise: PathwiseTerm | None) -> Experience:
        own = scored.sides[side]
        advantage = self.ranks.on_whole(self.algorithm.advantage, len(scored.positive.instance_ids))
        advantages = by_token(replace(self.algorithm, advantage=advantage), self._reward_of(scored, side), own, judged)
        rollouts = replace(own.rollouts, embeddings=None, prefix_embeddings=None, prompt_embeddings=None)  # judged by now, and large
        gradients = None if pathwise is None else pathwise.gradients[side]
        return Experience(rollouts, advantages, judged.keep, own.old_logprobs, own.reference_logprobs, own.instance_ids, gradients)

    # ---- the update

    def update(self, experience: Experience | None, gap: LogprobMismatch, pathwise: PathwiseTerm | None = None) -> dict[str, float]:
        """`updates_per_batch` optimiser steps, each on its share of the groups; means of what they saw.

        A step is all ranks', each with its own groups, and is left out where no rank has anything to learn from.

        `gap` takes in the log-probs of the first step, which are still those of the policy that the engine sampled from.
        """
        ranks, owned, count = self.ranks, 0 if experience is None else len(experience), self.algorithm.updates_per_batch
        own = 0 if pathwise is None else pathwise.instances // ranks.count
        sums: dict[str, float] = {}
        parts: dict[str, float] = {}
        steps = 0
        for number, groups in enumerate(torch.arange(owned).tensor_split(count)):
            part = experience.select(groups) if experience is not None and len(groups) else None
            companions = None
            if pathwise is not None and pathwise.companions is not None:
                bounds = torch.arange(own).tensor_split(count)[number].tolist()
                companions = pathwise.companions.of(bounds[0], bounds[-1] + 1) if bounds else None
            embedded = 0 if pathwise is None else (0 if part is None else len(part)) + (0 if companions is None else len(companions))
            # all masked out (truncated), still gathered, or more updates than groups
            if not ranks.total(embedded + (0 if part is None else part.tokens))[0]:
                continue
            measured = steps == 0 and self._is_measured(pathwise)
            # the mean over instances of an update: those of the batch are shared out over so many of them
            scale = 0.0 if pathwise is None else self.hparams["pathwise_weight"] * min(count, owned) / pathwise.instances
            stats = self._gradient(part, companions, scale, gap if steps == 0 else None, parts if measured else None)
            stats["grad_norm"] = self.take_step(() if part is None else part.instance_ids)
            sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
            steps += 1
        means = {name: value / steps for name, value in sums.items()} | parts
        if pathwise is not None:
            means["pathwise_reward"] = pathwise.mean
        return {**means, "updates": float(steps), "groups": ranks.total(owned)[0]}

    def _is_measured(self, pathwise: PathwiseTerm | None) -> bool:
        """Whether this batch logs the two parts of the gradient apart."""
        every = self.hparams["gradient_parts_every_n_rollout_batches"]
        both = pathwise is not None and self.hparams["score_function_weight"] > 0
        return bool(both and every and self.rollout_batches % every == 0)

    def _gradient(
        self,
        part: Experience | None,
        companions: Companions | None,
        scale: float,
        gap: LogprobMismatch | None,
        parts: dict[str, float] | None,
    ) -> dict[str, float]:
        """Adds up the gradient of one update.

        Args:
            scale: of the pathwise term.
            parts: where given, takes in the norms of the gradient's two parts and their cosine.
        """
        h = self.hparams
        how = MinibatchPass(h["micro_batch_tokens"], h["temperature"], self._backward, self.ranks, h["score_function_weight"], scale)
        if parts is None:
            return accumulate_gradients(self.policy, self.algorithm, part, how, gap, companions)
        stats, measured = gradient_in_parts(self.policy, self.algorithm, part, how, gap, companions)
        parts.update(measured)
        return stats

    def _backward(self, loss: Tensor, last: bool) -> None:
        with gradient_exchange(self.policy, self.trainer.strategy, now=last):
            self.manual_backward(loss)

    def _require_finite(self, terms: dict[str, Tensor], instance_ids: Sequence[str]) -> None:
        for name, term in terms.items():
            bad = (~torch.isfinite(term)).any(dim=1).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteError(
                    f"reward term {name!r} is not finite in rollout batch {self.rollout_batches}, records "
                    f"{', '.join(instance_ids[i] for i in bad)}; the weights were not changed"
                )

    # ---- Lightning

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["grace"]["held"] = self.ranks.objects(self.buffer.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.buffer.load_state_dict(shared_out(checkpoint["grace"]["held"], self.ranks))
