"""The interface of rollout engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts, end_ids
from src.modules.types import Rollouts


class RolloutEngine(Protocol):
    """Writes `n` rationales of at most `max_new_tokens` for each prompt: greedy at temperature 0, equal for equal seeds.

    The seed is one for all prompts, or [N] int64, one for each: a prompt's rationales then depend on no other prompt. An
    engine that copies the weights may have `holding(policy)`, a context in which it copies them once for all calls. One that is
    faster with several requests at once may have `generate_all(policy, requests)`.

    Attributes:
        exact: its log-probs are the trainer's but for rounding, so that the gradient needs no importance weights.
    """

    max_new_tokens: int
    exact: bool

    def generate(
        self, policy: Policy, prompts: Prompts, n: int, temperature: float, seed: int | Tensor, prefixes: bool = False
    ) -> Rollouts: ...


@dataclass(frozen=True)
class Request:
    """Prompts and what is to be written for them: the arguments of `RolloutEngine.generate`."""

    prompts: Prompts
    n: int
    temperature: float
    seed: int | Tensor
    prefixes: bool = False


def generate_all(engine: RolloutEngine, policy: Policy, requests: Sequence[Request]) -> list[Rollouts]:
    """Returns the rollouts of each request, from one call if the engine has one for all of them.

    A class that changes `generate` and inherits `generate_all` is asked request by request, so that its own method is not passed over.
    """
    classes = type(engine).__mro__
    own, together = (next((i for i, c in enumerate(classes) if name in vars(c)), len(classes)) for name in ("generate", "generate_all"))
    if together <= own and together < len(classes):
        written: list[Rollouts] = engine.generate_all(policy, requests)  # type: ignore[attr-defined]
        return written
    return [
        engine.generate(policy, one.prompts, n=one.n, temperature=one.temperature, seed=one.seed, prefixes=one.prefixes) for one in requests
    ]


def end_tokens(policy: Policy) -> Tensor:
    """Returns [E] int64, the ids that end a rationale: see `end_ids`."""
    return torch.tensor(end_ids(policy.tokenizer, policy.model.generation_config))
