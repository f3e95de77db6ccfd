"""Rationales that every processor draws alike.

Processors, and one process and several, round differently, and now and then rounding decides which token is sampled: another
token is another run. Here tokens come from the random draws alone, and everything else is the engine's own.
"""

from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from src.modules.policy.model import Policy
from src.modules.rollouts.engine import Request
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts


def taken(
    hidden: Tensor, weight: Tensor, draws: Tensor, temperatures: Tensor | None, *, end: int, mean_length: int
) -> tuple[Tensor, Tensor]:
    """In place of `choose`: a draw below 1 / mean_length is the end, and the others are spread evenly over the vocabulary.

    Args:
        hidden, weight, draws, temperatures: of `choose`; the draws alone decide, without temperatures as well.
        end: id of the end of a rationale.
        mean_length: tokens of a rationale on average, were there no limit.

    Returns:
        [N] ids and their log-probs under the policy.
    """
    spread = ((draws.double() - 1 / mean_length) / (1 - 1 / mean_length) * len(weight)).long().clamp(0, len(weight) - 1)
    ids = torch.where(draws < 1 / mean_length, end, spread)
    logits = (hidden.to(weight.dtype) / (1.0 if temperatures is None else temperatures) @ weight.T).float()
    return ids, logits.log_softmax(dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)


class DrawnRationales(HFEngine):
    """The in-process engine, but that tokens come from the draws alone."""

    mean_length = 32

    def generate_all(self, policy: Policy, requests: Sequence[Request]) -> list[Rollouts]:
        with patch("src.modules.rollouts.decoder.choose", partial(taken, end=policy.tokenizer.eos_token_id, mean_length=self.mean_length)):
            return super().generate_all(policy, requests)
