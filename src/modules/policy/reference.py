"""The reference of a KL term: the policy as it was before training."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.policy.attention.shared_prompt import micro_batches
from src.modules.policy.lora import has_lora, without_lora
from src.modules.policy.model import Policy
from src.modules.types import Rollouts


@dataclass(frozen=True)
class GroupEncoding:
    """The way of groups through the policy: K rollouts each, so many tokens at a time, at the sampling temperature."""

    num_generations: int
    micro_batch_tokens: int
    temperature: float


class Reference:
    """Log-probs under the policy's starting weights.

    With LoRA adapters the policy's own base weights are the reference. Otherwise it is a copy in float32 without gradients,
    as large as the weights. It is no part of a checkpoint: a resumed run makes it anew from policy.path.

    Args:
        policy: as training begins.

    Attributes:
        policy: the copy, or the policy with the base weights.
    """

    def __init__(self, policy: Policy) -> None:
        self._adapted = has_lora(policy.model)
        self.policy = policy if self._adapted else Policy(copy.deepcopy(policy.model).requires_grad_(False).eval(), policy.tokenizer)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, how: GroupEncoding) -> Tensor:
        """Returns [B*K, T] float32 log-probs of the rationales' tokens, 0 elsewhere."""
        policy, k = self.policy, how.num_generations
        if not self._adapted:
            policy.to(rollouts.input_ids.device)  # no module holds the copy, so none moves it
        values = torch.zeros(rollouts.input_ids.shape, device=rollouts.input_ids.device)
        with without_lora(policy.model) if self._adapted else nullcontext():
            for rows in micro_batches(rollouts, torch.arange(len(rollouts)), k, how.micro_batch_tokens):
                part = rollouts[rows]
                own, _ = policy.logprobs(part, policy.hidden_states(part, rows // k), how.temperature)
                values[rows, : own.shape[1]] = own
        return values
