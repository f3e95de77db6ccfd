"""What one rollout batch did: the module writes it, the callbacks read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.distributed.ranks import Ranks
from src.modules.objectives.judging import Judged
from src.modules.objectives.rewards import Reward
from src.modules.objectives.roles import Role
from src.modules.training.batch_report import speed
from src.modules.training.experience import Experience
from src.modules.training.logprob_mismatch import LogprobMismatch
from src.modules.training.scoring import Scored, unrelated_similarity


@dataclass(frozen=True)
class StepReport:
    """One rollout batch of B instances with K rollouts each, those of all ranks, and the same report on every rank.

    Tensors are detached and on the CPU, of positives but where it says so.

    Attributes:
        reward: the terms and their total, before any truncation penalty.
        other_rewards: what the rollouts of queries and negatives earned, [G, K] float32 by side, where they are learned from.
        advantages: [B, K] float32.
        finished: [B, K] bool, False where a rollout met the length limit.
        rationale_lengths: [B, K] int64, tokens.
        distinct_rationales: share of different rationales among the B*K.
        unrelated_similarity: mean cosine between positives of different instances; nan where B = 1.
        update: means over the optimiser's steps: loss, grad_norm (before clipping), clip_fraction, entropy (nats a
            token), approx_kl (to the sampling policy), kl_to_reference where there is a reference, all but the norm only where the
            algorithm's loss has a weight; updates, the number of steps, and groups, how many they learned from (both 0 while groups are
            gathered). With a pathwise term pathwise_reward, the mean of the reward that it differentiates; and of the first step of
            every so many batches score_function_grad_norm, pathwise_grad_norm and gradient_parts_cosine.
        logprob_mismatch: mean and largest distance of the engine's log-probs from the trainer's, in nats a token, over the tokens
            of the first step; nan where it took none, or the engine does not say.
        seconds: of the phases rollout, encode and update, and of reference and greedy where the algorithm has them; each the
            slowest rank's.
        rollout_tokens: tokens sampled, all sides.
        update_tokens: tokens of the sequences that were updated on, a shared prompt counted for each of its rollouts; 0 where
            no step was taken.
        instance_ids: B record ids.
    """

    reward: Reward
    other_rewards: dict[Role, Tensor]
    advantages: Tensor
    finished: Tensor
    rationale_lengths: Tensor
    distinct_rationales: float
    unrelated_similarity: float
    update: dict[str, float]
    logprob_mismatch: tuple[float, float]
    seconds: dict[str, float]
    rollout_tokens: int
    update_tokens: int
    instance_ids: list[str]

    def headline(self) -> dict[str, str]:
        """Mean reward, and sampled tokens a second."""
        return {"reward": f"{float(self.reward.total.mean()):.3f}", "tokens/s": speed(self.rollout_tokens, self.seconds.get("rollout"))}


def step_report(
    scored: Scored,
    reward: Reward,
    judged: Mapping[Role, Judged],
    advantages: Tensor,
    learned_from: Experience | None,
    update: dict[str, float],
    gap: LogprobMismatch,
    seconds: dict[str, float],
    ranks: Ranks,
    instance_ids: Sequence[str],
) -> StepReport:
    """To be called by all ranks.

    Args:
        scored, judged, gap, seconds: of this rank.
        reward: of the positives of all ranks, [B, K] terms.
        advantages: of this rank's positives, by token.
        learned_from: what this rank updated on; None while groups are gathered.
        update: of all ranks.
        instance_ids: of all ranks.
    """
    rollouts = scored.positive.rollouts
    own = len(instance_ids) // ranks.count

    def everywhere(values: Tensor) -> Tensor:
        """[B, K] of this rank's positives' [b * K]."""
        return ranks.gather(values.view(own, -1), own).cpu()

    rationales = torch.tensor([hash(tuple(ids.tolist())) for ids in rollouts.rationales()])
    updated = 0 if learned_from is None else int((learned_from.rollouts.lengths * learned_from.keep.flatten()).sum())
    rollout_tokens, update_tokens = ranks.total(scored.rollout_tokens, updated)
    return StepReport(
        reward=Reward({name: term.cpu() for name, term in reward.terms.items()}, reward.weights, reward.total.cpu()),
        other_rewards={side: ranks.gather(part.earned, own).cpu() for side, part in judged.items() if side != "positive"},
        advantages=everywhere(advantages.sum(dim=1) / rollouts.rationale_lengths),
        finished=everywhere(rollouts.finished),
        rationale_lengths=everywhere(rollouts.rationale_lengths),
        distinct_rationales=len(everywhere(rationales).unique()) / reward.total.numel(),
        unrelated_similarity=unrelated_similarity(scored.embeddings.positive),
        update=update,
        logprob_mismatch=gap.over(ranks),
        seconds=dict(zip(seconds, ranks.largest(*seconds.values()), strict=True)),
        rollout_tokens=int(rollout_tokens),
        update_tokens=int(update_tokens) if update["updates"] else 0,
        instance_ids=list(instance_ids),
    )
