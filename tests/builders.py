"""Small real parts for tests: a tokenizer trained on a few sentences, a random Qwen2, prompts and rollouts of it."""

import functools

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from experiments.tiny_policy.policy import train_tokenizer
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.types import Rollouts, join

SENTENCES = (
    "Return the eigenvalues of a symmetric matrix in ascending order.",
    "Open the file for reading and decode each line as text.",
    "The optimiser keeps a running mean of squared gradients.",
    "Read the following text and name the terms that matter to you.",
    "A short answer, then a longer one; both are about graphs and their edges.",
)


@functools.cache
def _trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES * 4, vocab_size=400)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A new byte-level tokenizer of some 400 tokens with a ChatML template."""
    trained = _trained()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer.from_str(trained.backend_tokenizer.to_str()),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
    )
    tokenizer.chat_template = trained.chat_template
    return tokenizer


def small_model(vocab_size: int, seed: int = 0, attention_dropout: float = 0.0) -> Qwen2ForCausalLM:
    """Two layers of 32 with random weights, wide enough apart that outputs differ clearly."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attention_dropout=attention_dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def small_policy(encoder: str = "live", seed: int = 0, attention_dropout: float = 0.0) -> Policy:
    """Tokenizer and model of this module as a policy."""
    tokenizer = small_tokenizer()
    return Policy(small_model(len(tokenizer), seed, attention_dropout), tokenizer, encoder)  # type: ignore[arg-type]


def some_rollouts(policy: Policy, rationale_lengths: tuple[int, ...] = (5, 0, 9, 1), seed: int = 0) -> Rollouts:
    """Rollouts with prompts of different lengths and random rationale ids, not sampled from the policy."""
    generator = torch.Generator().manual_seed(seed)
    texts = [SENTENCES[i % len(SENTENCES)][: 12 + 9 * i] for i in range(len(rationale_lengths))]
    prompts = PromptRenderer(policy.tokenizer, "Name the terms.", 128)(texts)
    ids = [torch.randint(5, len(policy.tokenizer), (length,), generator=generator) for length in rationale_lengths]
    return join(prompts, ids, torch.ones(len(ids), dtype=torch.bool), policy.pad_id)
