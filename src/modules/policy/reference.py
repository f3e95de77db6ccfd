"""The reference of a KL term: the policy as it was before training."""

import copy
from contextlib import nullcontext

import torch
from torch import Tensor

from src.modules.policy.batching import packed_batches
from src.modules.policy.lora import has_lora, without_lora
from src.modules.policy.model import Policy
from src.modules.types import Rollouts


class Reference:
    """Log-probs under the policy's starting weights.

    A policy with LoRA adapters holds them itself, beneath the adapters. Of any other a copy is made, in float32 and
    without gradients: it takes as much memory as the weights do. It is no part of a checkpoint, as a resumed run makes
    it anew from policy.path.

    Attributes:
        policy: it, or the one whose base weights it is.

    Args:
        policy: as training begins.
    """

    def __init__(self, policy: Policy) -> None:
        self._adapted = has_lora(policy.model)
        self.policy = policy if self._adapted else Policy(copy.deepcopy(policy.model).requires_grad_(False).eval(), policy.tokenizer)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, k: int, micro_batch_tokens: int, temperature: float) -> Tensor:
        """Returns [G*K, T] float32 log-probs of the rationales' tokens at the sampling temperature, 0 elsewhere."""
        policy = self.policy
        if not self._adapted:
            policy.to(rollouts.input_ids.device)  # no module holds the copy, so none moves it
        values = torch.zeros(rollouts.input_ids.shape, device=rollouts.input_ids.device)
        with without_lora(policy.model) if self._adapted else nullcontext():
            for rows in packed_batches(rollouts, torch.arange(len(rollouts)), k, micro_batch_tokens):
                part = rollouts[rows]
                own, _ = policy.logprobs(part, policy.hidden_states(part, rows // k), temperature)
                values[rows, : own.shape[1]] = own
        return values
