"""Divergence of the policy from its start, without a second model in memory."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.callbacks.monitoring import MonitoringCallback, fixed_triplets, is_due, log_values, sample, undisturbed
from src.modules.objectives.roles import texts_of
from src.modules.policy.batching import packed_batches
from src.modules.policy.model import Policy
from src.modules.policy_module import PolicyModule
from src.modules.types import Rollouts


class StartingPolicyKL(MonitoringCallback[PolicyModule]):
    """Logs kl/from_start: an estimate of KL(starting policy || policy) in nats a token, on rationales of held-out texts.

    The starting policy samples the rationales once, at temperature 1; every n batches the policy scores the same tokens. The mean of
    log pi_start - log pi over tokens drawn from pi_start is unbiased; noise can make a small one negative.

    Args:
        texts: how many texts.
        every_n_rollout_batches: how often; 0 for never.
        seed: of the sampling.
    """

    def __init__(self, texts: int = 32, every_n_rollout_batches: int = 5, seed: int = 0) -> None:
        self.texts, self.every, self.seed = texts, every_n_rollout_batches, seed
        self._rollouts: Rollouts | None = None
        self._start: Tensor | None = None

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.every > 0 and self._rollouts is None:  # else a resumed run has those of its start
            with undisturbed(module):
                texts = texts_of(fixed_triplets(trainer, self.texts), "positive")
                self._rollouts = sample(module, texts, temperature=1.0, seed=self.seed).to("cpu")
                self._start = token_logprobs(module.policy, self._rollouts, module.hparams["micro_batch_tokens"])

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if is_due(module, self.every):
            log_values(trainer, {"kl/from_start": self.divergence(module)}, module.rollout_batches)

    def divergence(self, module: PolicyModule) -> float:
        """Returns the current estimate in nats a token; raises RuntimeError before the start of training."""
        if self._rollouts is None or self._start is None:
            raise RuntimeError("the starting policy has sampled no rationales yet: it does so when training starts")
        with undisturbed(module):
            return float((self._start - token_logprobs(module.policy, self._rollouts, module.hparams["micro_batch_tokens"])).mean())

    def state_dict(self) -> dict[str, Any]:
        if self._rollouts is None:
            return {}
        return {"rollouts": {k: v for k, v in vars(self._rollouts).items() if v is not None}, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._rollouts, self._start = Rollouts(**state_dict["rollouts"]), state_dict["start"]


def token_logprobs(policy: Policy, rollouts: Rollouts, tokens: int) -> Tensor:
    """Returns [n] float32 on the CPU: log-probs of all rationale tokens at temperature 1, row after row, in passes of `tokens` tokens."""
    scored = []
    for rows in packed_batches(rollouts, torch.arange(len(rollouts)), 1, tokens):
        part = rollouts[rows].to(policy.device)
        scored.append(policy.logprobs(part, policy.hidden_states(part, rows))[0][part.rationale_mask].cpu())
    return torch.cat(scored)
