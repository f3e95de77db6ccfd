"""How far the policy has moved from where it started, without a second model in memory."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.callbacks.monitoring import MonitoringCallback
from src.callbacks.probe import fixed_texts, is_due, sample, undisturbed
from src.modules.policy.model import Policy
from src.modules.policy_module import PolicyModule
from src.modules.types import Rollouts


def score(policy: Policy, rollouts: Rollouts, batch_size: int) -> Tensor:
    """[n] float32 on the CPU: log-probs of all rationale tokens, row after row, under a policy at T = 1."""
    scored = []
    for start in range(0, len(rollouts), batch_size):
        part = rollouts[slice(start, start + batch_size)].to(policy.device)
        scored.append(policy.logprobs(part, policy.hidden_states(part))[0][part.rationale_mask].cpu())
    return torch.cat(scored)


class StartingPolicyKL(MonitoringCallback):
    """Logs `kl/from_start`: an estimate of KL(starting policy || policy) in nats a token, on fixed held-out texts.

    The starting policy writes rationales at T = 1 once, and its log-probs of them are kept; every so often the policy
    scores the same tokens. The mean of log pi_start - log pi_now over tokens drawn from pi_start is unbiased.
    It is 0 at the start; noise can make a small one negative.

    Args:
        texts: how many texts.
        every_n_rollout_batches: how often; 0 for never.
        batch_size: sequences scored together.
        seed: of the sampling.
    """

    def __init__(self, texts: int = 32, every_n_rollout_batches: int = 5, batch_size: int = 32, seed: int = 0) -> None:
        self.texts, self.every, self.batch_size, self.seed = texts, every_n_rollout_batches, batch_size, seed
        self._rollouts: Rollouts | None = None
        self._start: Tensor | None = None

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self.every == 0 or self._rollouts is not None:
            return  # nobody asks; or resumed: the checkpoint brought what the starting policy wrote
        with undisturbed(module):
            self._rollouts = sample(module, fixed_texts(trainer, self.texts), temperature=1.0, seed=self.seed).to("cpu")
            self._start = score(module.policy, self._rollouts, self.batch_size)

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if is_due(module, self.every):
            module.log("kl/from_start", self.divergence(module), on_step=True, on_epoch=False)

    def divergence(self, module: PolicyModule) -> float:
        """The estimate now, in nats a token.

        Raises:
            RuntimeError: training has not started.
        """
        if self._rollouts is None or self._start is None:
            raise RuntimeError("the starting policy has written nothing yet: divergence is known from on_train_start on")
        with undisturbed(module):
            return float((self._start - score(module.policy, self._rollouts, self.batch_size)).mean())

    def state_dict(self) -> dict[str, Any]:
        if self._rollouts is None:
            return {}
        return {"rollouts": {k: v for k, v in vars(self._rollouts).items() if v is not None}, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._rollouts, self._start = Rollouts(**state_dict["rollouts"]), state_dict["start"]
