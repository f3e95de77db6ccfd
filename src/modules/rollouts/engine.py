"""The interface of rollout engines."""

from typing import Protocol

import torch
from torch import Tensor

from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts, end_ids
from src.modules.types import Rollouts


class RolloutEngine(Protocol):
    """Writes `n` rationales of at most `max_new_tokens` for each prompt: greedy at temperature 0, equal for equal seeds.

    The seed is one for all prompts, or [N] int64, one for each: a prompt's rationales then depend on no other prompt. An
    engine that copies the weights may have `holding(policy)`, a context in which it copies them once for all calls.
    """

    max_new_tokens: int

    def generate(
        self, policy: Policy, prompts: Prompts, n: int, temperature: float, seed: int | Tensor, prefixes: bool = False
    ) -> Rollouts: ...


def end_tokens(policy: Policy) -> Tensor:
    """Returns [E] int64, the ids that end a rationale: see `end_ids`."""
    return torch.tensor(end_ids(policy.tokenizer, policy.model.generation_config))
