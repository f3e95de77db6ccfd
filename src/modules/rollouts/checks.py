"""Checks a backbone: it must attend by transformers' attention interface, at the positions it is given."""

from typing import Any

import torch
from torch import Tensor

from src.modules.policy.attention.shared_prompt import require_supported
from src.modules.policy.model import Policy, evaluation_mode
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.hf import HFEngine
from src.modules.types import join

_TOLERANCE = 1e-3
"""Nats. Rounding is some 1e-5; another attention, or positions that are not read, are 1e-2 and more."""

_PROMPTS, _RATIONALES = (7, 4), (3, 1, 2, 2)  # lengths; positions start anew with each prompt


def require_readable(policy: Policy, longest: int = 0) -> None:
    """Compares log-probs of random tokens by a plain pass, by one that shares a prompt, and by the engine token by token.

    Raises ValueError if they differ, or if the backbone cannot be called so: training would compute wrong gradients. And if a layer sees
    fewer than `longest` tokens, those of the longest prompt with its rationale.
    """
    windows: list[Any] = [layer.sliding_window for layer in policy.model.modules() if hasattr(layer, "sliding_window")]
    for window in windows or [getattr(policy.model.config.get_text_config(), "sliding_window", None)]:  # Mistral's layers ask the config
        require_supported({"sliding_window": window}, longest)
    name = type(policy.model).__name__
    advice = "its rollouts could not be computed rightly here; use a model whose layers call transformers' AttentionInterface (Llama, Qwen)"
    try:
        with evaluation_mode(policy):
            differences = _differences(policy)
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"{name} does not attend as rollouts that share a prompt need it ({reason}): {advice}") from error
    for way, difference in differences.items():
        if not difference <= _TOLERANCE:
            raise ValueError(f"log-probs of {name} are off by {difference:.2g} nats {way}: {advice}")


def _differences(policy: Policy) -> dict[str, float]:
    def largest(difference: Tensor) -> float:
        return float(difference.abs().max())

    generator = torch.Generator().manual_seed(0)
    vocabulary = len(policy.head)
    lengths = (*_PROMPTS, *_RATIONALES)
    ids = torch.randint(vocabulary, (sum(lengths),), generator=generator).split(lengths)
    prompts = Prompts(ids[:2], torch.tensor([1, 1]), torch.tensor(_PROMPTS) - 1)
    four = join(prompts.repeat(2), ids[2:], torch.ones(4, dtype=torch.bool), policy.pad_id).to(policy.device)
    written = HFEngine(2).generate(policy, prompts, n=1, temperature=0.0)
    return {
        "where rationales share their prompt's computation": largest(policy(four)[0] - policy(four, torch.tensor([0, 0, 1, 1]))[0]),
        "where they are sampled": largest((policy(written)[0] - written.logprobs) * written.rationale_mask),
    }
