"""What one rollout batch did: the module writes it, the callbacks read it."""

from dataclasses import dataclass

from torch import Tensor

from src.modules.rewards import Reward


@dataclass(frozen=True)
class StepReport:
    """One rollout batch of B instances with K rollouts each. Tensors are detached and on the CPU.

    Attributes:
        reward: the terms and their total, before any truncation penalty.
        advantages: [B, K] float32.
        finished: [B, K] bool, False where a rollout met the length limit.
        rationale_lengths: [B, K] int64, tokens.
        distinct_rationales: share of different rationales among the B*K.
        unrelated_similarity: mean cosine between positives of different instances; nan where B = 1.
        update: means over the optimiser's steps: loss, gradient_norm (before clipping), clip_share, entropy (nats a
            token), approx_kl (to the sampling policy), reference_kl where there is a reference; updates, the number of
            steps, and groups, how many they learned from (both 0 while groups are gathered).
        logprob_gap: mean and largest distance of the engine's log-probs from the trainer's, in nats a token, over the tokens
            of the first step; nan where it took none, or the engine does not say.
        seconds: of the phases rollout, encode and update, and of reference and greedy where the algorithm has them.
        rollout_tokens: tokens sampled, all sides.
        update_tokens: tokens of the sequences that were updated on, a shared prompt counted for each of its rollouts.
        instance_ids: B record ids.
    """

    reward: Reward
    advantages: Tensor
    finished: Tensor
    rationale_lengths: Tensor
    distinct_rationales: float
    unrelated_similarity: float
    update: dict[str, float]
    logprob_gap: tuple[float, float]
    seconds: dict[str, float]
    rollout_tokens: int
    update_tokens: int
    instance_ids: list[str]
