"""Checks a backbone: it must attend by transformers' attention interface, at the positions it is given, and close its turns."""

import logging

import torch
from torch import Tensor

from src.modules.policy.model import Policy, evaluation_mode
from src.modules.prompt.renderer import Prompts, unclosed_turn
from src.modules.rollouts.hf import HFEngine
from src.modules.types import join

log = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Nats. Rounding is some 1e-5; another attention, or positions that are not read, are 1e-2 and more."""

_PROMPTS, _RATIONALES = (7, 4), (3, 1, 2, 2)  # lengths, the longest first; positions start anew with each prompt


def warn_of_unclosed_turn(policy: Policy) -> None:
    """Warns if no token that ends a rationale is in what the chat template renders after an answer."""
    closing = unclosed_turn(policy.tokenizer, policy.model.generation_config)
    if closing is not None:
        log.warning(
            "the chat template closes an answer with %r, in which is no token that ends a rationale (EOS is %r): rationales will "
            "probably run to rollout.max_new_tokens; name the token in the model's generation_config.json (eos_token_id)",
            *(closing, policy.tokenizer.eos_token),
        )


def require_readable(policy: Policy, longest: int = 0) -> None:
    """Compares log-probs of random tokens by a plain pass, by one that shares a prompt, and by the engine token by token.

    Where layers see a window of fewer than `longest` tokens, those of the longest prompt with its rationale, one prompt is longer than the
    window.

    Raises ValueError if they differ, or if the backbone cannot be called so: training would compute wrong gradients.
    """
    config = policy.model.config.get_text_config()
    name = type(policy.model).__name__
    advice = "its rollouts could not be computed rightly here; use a model whose layers call transformers' AttentionInterface (Llama, Qwen)"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # Llama 4
        raise ValueError(f"layers of {name} attend within chunks of tokens (its attention_chunk_size): {advice}")
    window = getattr(config, "sliding_window", None)
    prompts = (window + _PROMPTS[0], _PROMPTS[1]) if window and window < longest else _PROMPTS
    try:
        with evaluation_mode(policy):
            differences = _differences(policy, prompts)
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"{name} does not attend as rollouts that share a prompt need it ({reason}): {advice}") from error
    for way, difference in differences.items():
        if not difference <= _TOLERANCE:
            raise ValueError(f"log-probs of {name} are off by {difference:.2g} nats {way}: {advice}")


def _differences(policy: Policy, prompt_lengths: tuple[int, int]) -> dict[str, float]:
    def largest(difference: Tensor) -> float:
        return float(difference.abs().max())

    generator = torch.Generator().manual_seed(0)
    vocabulary = len(policy.head)
    lengths = (*prompt_lengths, *_RATIONALES)
    ids = torch.randint(vocabulary, (sum(lengths),), generator=generator).split(lengths)
    prompts = Prompts(ids[:2], torch.tensor([1, 1]), torch.tensor(prompt_lengths) - 1)
    four = join(prompts.repeat(2), ids[2:], torch.ones(4, dtype=torch.bool), policy.pad_id).to(policy.device)
    written = HFEngine(2).generate(policy, prompts, n=1, temperature=0.0)
    return {
        "where rationales share their prompt's computation": largest(policy(four)[0] - policy(four, torch.tensor([0, 0, 1, 1]))[0]),
        "where they are sampled": largest((policy(written)[0] - written.logprobs) * written.rationale_mask),
    }
