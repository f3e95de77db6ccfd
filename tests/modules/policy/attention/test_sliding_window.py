"""Models whose layers see a window of the last tokens: as transformers computes them where prompt and rationale fit, else refused."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from src.modules.policy.model import Policy
from src.modules.rollouts.checks import require_readable
from src.modules.rollouts.hf import HFEngine
from tests.builders import small_tokenizer, some_rollouts
from tests.vllm_builders import prompts_of

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = {"query_pre_attn_scalar": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def windowed(kind: str, window: int) -> Policy:
    """A random policy; Gemma's scale is not the usual one, and its layers alternate."""
    tokenizer = small_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    common = {**SHAPE, **ids, "num_hidden_layers": 3, "max_position_embeddings": 256, "sliding_window": window}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**common, **GEMMA)) if kind == "gemma3" else MistralForCausalLM(MistralConfig(**common))
    return Policy(model.eval(), tokenizer)


def plain_logprobs(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens of one sequence after the first, by the model alone."""
    log_p = policy.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[1:, None]).squeeze(1)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_within_the_window_as_transformers_computes(kind):
    policy = windowed(kind, 200)
    require_readable(policy)
    rollouts = some_rollouts(policy, (5, 3, 9, 1))
    groups = torch.arange(len(rollouts.input_ids))
    engine = HFEngine(6)
    with torch.no_grad():
        ours = policy(rollouts, groups)[0]
        sampled = engine.generate(policy, prompts_of(policy), n=2, temperature=1.0, seed=0)
        for found, logprobs in ((rollouts, ours), (sampled, sampled.logprobs)):
            for row, (prompt, length) in enumerate(zip(found.prompt_lengths.tolist(), found.rationale_lengths.tolist(), strict=True)):
                expected = plain_logprobs(policy, found.input_ids[row, : prompt + length])[prompt - 1 :]
                torch.testing.assert_close(logprobs[row][found.rationale_mask[row]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_beyond_the_window_is_refused(kind):
    policy = windowed(kind, 24)
    rollouts = some_rollouts(policy)
    longest = int((rollouts.prompt_lengths + rollouts.rationale_lengths).max())
    with pytest.raises(ValueError, match=rf"last 24 tokens \(its sliding_window\), .* up to {longest}: keep module.max_prompt_tokens"):
        policy(rollouts, torch.arange(len(rollouts.input_ids)))
    with pytest.raises(ValueError, match=r"last 24 tokens \(its sliding_window\)"):
        HFEngine(3).generate(policy, prompts_of(policy))
    with pytest.raises(ValueError, match=r"last 24 tokens \(its sliding_window\), .* up to 25:"):
        require_readable(policy, 25)  # before a run begins
