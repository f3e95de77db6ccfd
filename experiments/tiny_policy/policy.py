"""The tiny policy before training: a tokenizer and a small Qwen2 with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from src.datamodules.docstrings import collect
from src.modules.policy.model import Policy

TINY_INSTRUCTION = "Name the terms that matter, then sum the text up."

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE with ChatML's control tokens, <think> and </think>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, TINY_INSTRUCTION, "system user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: Any) -> Policy:
    """Returns a Qwen2 with random weights and tied embeddings for a tokenizer; `config` goes to Qwen2Config."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **ids, **config)), tokenizer)


def fresh_policy(
    packages: Sequence[str],
    cache_dir: str,
    vocab_size: int = 4096,
    hidden_size: int = 256,
    intermediate_size: int = 640,
    layers: int = 4,
    heads: int = 4,
    key_value_heads: int = 2,
    max_positions: int = 1024,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> Policy:
    """Returns a policy with random weights and a tokenizer trained on the docstrings of `packages`."""
    docs = collect(packages, cache_dir)
    tokenizer = train_tokenizer([f"{doc.summary}\n{doc.body}" for doc in docs], vocab_size)
    return random_policy(
        tokenizer,
        seed,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=max_positions,
        attn_implementation=attn_implementation,
    )
