"""GRACE: rationales are sampled, their embeddings rewarded, and the policy moves towards rationales that embed well."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from src.modules.distributed.fsdp import gradient_sync, shard, summon_full_params
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.credit import at_tokens, token_advantages
from src.modules.objectives.distillation import Distillation, distillation_gradients
from src.modules.objectives.pathwise import RewardGradients, first_of_group, reward_and_gradients
from src.modules.objectives.rewards import RewardFunction, without_autocast
from src.modules.objectives.roles import role_reward
from src.modules.objectives.shaping import ShapedRewards, shape_rewards
from src.modules.policy.model import Policy
from src.modules.policy.reference import Reference
from src.modules.policy_module import PolicyModule
from src.modules.rollouts.checks import require_readable, warn_of_unclosed_turn
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.checks import check_settings
from src.modules.training.collector import Collector
from src.modules.training.dynamic_sampling import GroupBuffer, shared_out
from src.modules.training.experience import Context, Experience, concatenate, interleaving, join_contexts
from src.modules.training.finite import require_finite_rewards
from src.modules.training.metrics import grace_metrics
from src.modules.training.update import Updater
from src.modules.types import ROLES, Embeddings, Reward, Role, RolloutBatch
from src.records import Triplet
from src.utils.preemption import stop_between_phases
from src.utils.sharded_strategy import ShardedStrategy
from src.utils.timing import timed

log = logging.getLogger(__name__)


class GRACE(PolicyModule):
    """Trains a policy by the contrastive rewards of its rationales (Sun et al., arXiv 2510.04506).

    One `training_step` is one rollout batch: K rationales for each positive, one for each query and negative, rewards, advantages within
    groups, and `algorithm.updates_per_batch` optimiser steps on the positives' rationale tokens. Queries and negatives can be learned from
    as well.

    Args:
        policy: writes the rationales, and embeds.
        engine: samples them.
        reward: Embeddings -> Reward. An nn.Module keeps its buffers, of any shape, in checkpoints, and its parameters are not trained; if
            it has a method `remember(embeddings)`, that is called once after each rollout batch with the unit vectors of the global batch.
        algorithm: see Algorithm.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        num_generations: K.
        temperature, context_temperature: of sampling; the second for queries and negatives.
        also_learn_from: `query`, `negative` or both: K rollouts of these too, at `temperature`, rewarded by roles.role_reward; none as
            published.
        micro_batch_tokens: most tokens in one forward and backward pass, a prompt counted once for its rationales.
        learning_rate, warmup_steps, weight_decay: AdamW; linear warm-up over optimiser steps, then constant.
        max_grad_norm: gradients are scaled down to it.
        seed: of the rollouts; each batch and role draws its own stream from it, whatever the number of processes.
        score_function_weight: of the algorithm's loss, whose gradient says which rationales are written; 1 as published.
        pathwise_weight: of the derivative of the mean reward in the embeddings, whose gradient says how what is written is embedded (see
            objectives/pathwise.py); 0 as published. The derivative is taken once a rollout batch, at the embeddings of the policy that
            sampled, and held over its updates; each update embeds again. Rollouts that the algorithm's loss leaves out take part too.
        pathwise_roles: whose embeddings are moved: `positive`, `query`, `negative`.
        pathwise_reward: Embeddings -> Reward, by which the embeddings are moved; None: `reward`.
        distill_weight: of a loss that draws the embedding of a text without a rationale to its embedding with one, which is held, so
            that the encoder reads well without writing. Texts of all roles take part, each with one more pass of its prompt.
        distill_loss: `similarity` or `cosine`; see objectives/distillation.py.
        gradient_parts_every_n_rollout_batches: how often the first update takes one more pass, to log the norms of both parts of the
            gradient and the cosine between them; 0: never.

    Raises:
        ValueError: num_generations < 2; a temperature, a role, a weight or a size out of range; a pathwise term with a frozen encoder or
            with an algorithm that leaves groups out.
    """

    unit = "rollout batch"

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        reward: RewardFunction,
        algorithm: Algorithm,
        instruction: str | None,
        max_prompt_tokens: int = 1024,
        template_kwargs: dict[str, str] | None = None,
        num_generations: int = 8,
        temperature: float = 1.0,
        context_temperature: float = 0.5,
        also_learn_from: Sequence[Role] | None = (),
        micro_batch_tokens: int = 8192,
        learning_rate: float = 1e-6,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        score_function_weight: float = 1.0,
        pathwise_weight: float = 0.0,
        pathwise_roles: Sequence[Role] | None = ROLES,
        pathwise_reward: RewardFunction | None = None,
        distill_weight: float = 0.0,
        distill_loss: Distillation = "similarity",
        gradient_parts_every_n_rollout_batches: int = 10,
    ) -> None:
        super().__init__(policy, engine, instruction, max_prompt_tokens, template_kwargs, rationale=True)
        also_learn_from = tuple(map(str, also_learn_from or ()))  # type: ignore[arg-type]  # plain, to be kept in checkpoints
        pathwise_roles = tuple(map(str, pathwise_roles or ()))  # type: ignore[arg-type]
        self.save_hyperparameters(ignore=["policy", "engine", "reward", "algorithm", "template_kwargs", "pathwise_reward"])
        algorithm = algorithm.for_engine(engine.exact)
        check_settings({**self.hparams, "max_new_tokens": engine.max_new_tokens}, policy.frozen_encoder is not None, algorithm)
        self.algorithm, self.reward_function, self.pathwise_reward_function = algorithm, reward, pathwise_reward
        for function in self._reward_modules.values():
            function.requires_grad_(False)  # no optimiser has their weights, and DDP would wait for the gradients
        self.reward = without_autocast(reward)
        self.pathwise_reward = None if pathwise_reward is None else without_autocast(pathwise_reward)
        self.reference = Reference(policy) if algorithm.kl_coef else None
        self.buffer = GroupBuffer(algorithm.min_group_std, algorithm.max_extra_batches)

    # ---- one rollout batch

    def training_step(self, batch: list[Triplet], batch_idx: int) -> None:
        seconds: dict[str, float] = {}
        self.policy.eval()
        with torch.no_grad(), summon_full_params(self.policy):
            rollouts = self.collector.collect(batch, self.rollout_batches)  # rationales and embeddings, gathered over ranks once
            stop_between_phases(self._trainer)  # nothing of this batch is kept yet
            reward, gradients = self.rewards_of(rollouts.embeddings)  # terms and total [B, K]; dR/dh for the pathwise part
            shaped, advantages = self.shaped_and_advantages(rollouts, reward)  # truncation, length, KL; [G, K, R]
            rollouts = rollouts.without_prefixes()  # not held through the update
            experience, context = self.experience_of(rollouts, shaped, advantages, gradients)  # what this rank learns from
            context, distilled = self.distillation_of(rollouts, context)  # texts without rationales, with distill_weight
        self.policy.train()
        with timed(seconds, "update"):
            update = self.updater.update(experience, context, len(batch))
        self.rollout_batches += 1
        update |= distilled | ({} if gradients is None else {"pathwise_reward": gradients.mean_reward})
        self.batch_metrics = grace_metrics(
            batch=rollouts,
            reward=reward,
            shaped=shaped,
            advantages=advantages["positive"],
            learned_from=experience,
            update=update,
            seconds=seconds["update"],
            ranks=self.ranks,
        )
        with torch.autocast(self.device.type, enabled=False):
            for function in (self.reward_function, self.pathwise_reward_function):
                if function is not None and hasattr(function, "remember"):
                    function.remember(rollouts.embeddings)

    @property
    def _reward_modules(self) -> dict[str, nn.Module]:
        functions = {"reward_function": self.reward_function, "pathwise_reward_function": self.pathwise_reward_function}
        return {name: function for name, function in functions.items() if isinstance(function, nn.Module)}

    @property
    def collector(self) -> Collector:
        """Samples rollout batches with the policy as it is."""
        own = {f.name: self.hparams[f.name] for f in fields(Collector) if f.name in self.hparams}
        return Collector(self.policy, self.engine, self.renderer, self.reference, self.algorithm, self.ranks, **own)

    def rewards_of(self, embeddings: Embeddings) -> tuple[Reward, RewardGradients | None]:
        """Computes the positives' reward, and with a pathwise term `pathwise_weight` times its derivative in the embeddings."""
        weight = self.hparams["pathwise_weight"]
        if not weight:
            return self.reward(embeddings), None
        differentiated = self.pathwise_reward or self.reward
        reward, gradients = reward_and_gradients(differentiated, embeddings, self.hparams["pathwise_roles"])
        gradients = replace(gradients, by_role={role: weight * gradient for role, gradient in gradients.by_role.items()})
        return (reward if self.pathwise_reward is None else self.reward(embeddings)), gradients

    def shaped_and_advantages(self, rollouts: RolloutBatch, reward: Reward) -> tuple[dict[Role, ShapedRewards], dict[Role, Tensor]]:
        """Shapes the rewards of each role that is learned from, and computes its advantages, [G, K, R] or [G, K, 1]."""
        ids = rollouts.instance_ids
        require_finite_rewards({**reward.terms, "total": reward.total}, ids, self.rollout_batches)
        shaped, advantages = {}, {}
        for role, group in rollouts.roles.items():
            reward_of = role_reward(self.reward, rollouts.embeddings, role)
            raw = self.algorithm.scores(reward, group.finished) if role == "positive" else reward_of(group.embeddings)
            texts = [name for name in ids for _ in range(len(raw) // len(ids))]
            require_finite_rewards({f"{role} rollouts": raw}, texts, self.rollout_batches)
            shaped[role] = shape_rewards(self.algorithm, raw, group, reward_of)
            advantages[role] = token_advantages(self.algorithm, shaped[role], group, reward_of)
        return shaped, advantages

    def experience_of(
        self,
        batch: RolloutBatch,
        shaped: dict[Role, ShapedRewards],
        advantages: dict[Role, Tensor],
        gradients: RewardGradients | None,
    ) -> tuple[Experience | None, Context | None]:
        """Returns what this rank learns from: its groups of all roles, mixed; and the context that only the pathwise term moves."""
        instances, k = len(batch.instance_ids) // self.ranks.count, self.hparams["num_generations"]
        rows = {} if gradients is None else {role: self.ranks.own(g.flatten(0, -2), instances) for role, g in gradients.by_role.items()}
        parts, rewards = [], []
        for role, group in batch.roles.items():
            derivatives = rows.get(role)
            parts.append(
                Experience(
                    rollouts=group.rollouts,
                    advantages=at_tokens(self.ranks.own(advantages[role], instances).flatten(0, 1), group.rollouts),
                    keep=self.ranks.own(shaped[role].keep, instances),
                    old_logprobs=group.old_logprobs,
                    reference_logprobs=group.reference_logprobs,
                    instance_ids=group.instance_ids,
                    embedding_gradients=derivatives if derivatives is None or role == "positive" else first_of_group(derivatives, k),
                )
            )
            rewards.append(self.ranks.own(shaped[role].rewards, instances))
        experience, together = parts[0], rewards[0]
        if len(parts) > 1:
            order = interleaving([len(part) for part in parts])
            experience, together = concatenate(parts).select(order), torch.cat(rewards)[order]
        return self.buffer.add(experience, together, self.ranks), self._context(batch, rows, instances)

    def _context(self, batch: RolloutBatch, gradients: dict[Role, Tensor], instances: int) -> Context | None:
        """Returns the queries and negatives that are not learned from and whose embeddings are moved; None if there are none."""
        if batch.context is None or not gradients:
            return None
        counts = [len(gradients[role]) for role in batch.context_roles]
        moved = [role in self.hparams["pathwise_roles"] for role in batch.context_roles]
        taken = torch.cat([torch.full((count,), own) for count, own in zip(counts, moved, strict=True)]).nonzero().flatten()
        if not len(taken):
            return None
        places = torch.cat([torch.arange(count) // (count // instances) for count in counts])
        derivatives = torch.cat([gradients[role] for role in batch.context_roles])
        return Context(batch.context[taken], derivatives[taken], places[taken])

    def distillation_of(self, batch: RolloutBatch, context: Context | None) -> tuple[Context | None, dict[str, float]]:
        """Adds the texts without rationales to the context, with the derivative of the distillation; returns its loss to be logged."""
        if not batch.plain:
            return context, {}
        instances = len(batch.instance_ids) // self.ranks.count
        plain = {role: part.embeddings for role, part in batch.plain.items()}
        loss, gradients = distillation_gradients(plain, batch.embeddings, self.hparams["distill_loss"])
        parts = [] if context is None else [context]
        for role, part in batch.plain.items():
            derivatives = self.hparams["distill_weight"] * self.ranks.own(gradients[role], instances)
            places = torch.arange(len(derivatives)) // (len(derivatives) // instances)
            parts.append(Context(part.rollouts, derivatives, places))
        return join_contexts(parts), {"distill_loss": loss}

    @property
    def updater(self) -> Updater:
        """Takes the optimiser steps."""
        h, every = self.hparams, self.hparams["gradient_parts_every_n_rollout_batches"]
        measures = h["pathwise_weight"] > 0 and h["score_function_weight"] > 0 and every and self.rollout_batches % every == 0
        return Updater(
            policy=self.policy,
            algorithm=self.algorithm,
            ranks=self.ranks,
            temperature=h["temperature"],
            micro_batch_tokens=h["micro_batch_tokens"],
            score_function_weight=h["score_function_weight"],
            embeds=h["pathwise_weight"] + h["distill_weight"] > 0,
            measure_parts=bool(measures),
            backward=self._backward,
            take_step=self.take_step,
        )

    def _backward(self, loss: Tensor, last: bool) -> None:
        with gradient_sync(self.policy, self.trainer.strategy, now=last):
            self.manual_backward(loss)

    # ---- Lightning

    def setup(self, stage: str) -> None:
        """Validates precision and backbone."""
        super().setup(stage)
        for remark in self.algorithm.remarks():
            log.info(remark)
        warn_of_unclosed_turn(self.policy)
        require_readable(self.policy, self.settings.max_prompt_tokens + self.engine.max_new_tokens)  # before its weights are sharded
        if self.ranks.count > 1:  # adapters were drawn alike on all ranks; dropout must not be
            torch.manual_seed(hash((self.hparams["seed"], self.global_rank)) % 2**31)

    def configure_model(self) -> None:
        """Shards the policy's weights over the ranks, under a strategy for that."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            if strategy.gather_dtype != torch.float32 and self.trainer.precision != "bf16-mixed":
                raise ValueError(f"trainer.strategy.gather_dtype=bfloat16 needs trainer.precision=bf16-mixed, not {self.trainer.precision}")
            shard(self.policy, strategy.device_mesh["data_parallel"], strategy.reduce_dtype, strategy.gather_dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["grace"]["held"] = self.ranks.objects(self.buffer.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.buffer.load_state_dict(shared_out(checkpoint["grace"]["held"], self.ranks))
        for name, function in self._reward_modules.items():
            for part, buffer in function.named_buffers(name):
                if part in checkpoint["state_dict"]:  # of the batch before, say, whose size a new module cannot know
                    buffer.resize_(checkpoint["state_dict"][part].shape)
