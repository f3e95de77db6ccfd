"""Backbones whose log-probs would be wrong are an error before training."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src.modules.policy.model import Policy
from src.modules.rollouts.checks import require_readable
from tests.builders import small_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
OWN = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": {"sliding_window": None},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2},
}


def random_model(kind: str) -> PreTrainedModel:
    known = AutoConfig.for_model(kind).to_dict()
    settings = {name: value for name, value in (SHAPE | OWN.get(kind, {})).items() if name in known or name in OWN.get(kind, {})}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=len(small_tokenizer()), initializer_range=0.2, **settings, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma", "olmo2", "gpt_neox", "opt"])
def test_supported_backbones(kind: str) -> None:
    policy = Policy(random_model(kind), small_tokenizer()).train()
    require_readable(policy)
    assert policy.training


def test_chunks_are_refused() -> None:
    policy = Policy(random_model("llama4_text"), small_tokenizer())
    with pytest.raises(ValueError, match=r"layers of Llama4ForCausalLM attend within chunks of tokens \(its attention_chunk_size\)"):
        require_readable(policy)


@pytest.mark.parametrize("kind", ["bloom", "stablelm", "lfm2"])
def test_unsupported_backbones(kind: str) -> None:
    policy = Policy(random_model(kind), small_tokenizer())
    with pytest.raises(ValueError, match=r"could not be computed rightly here; use a model whose layers call") as caught:
        require_readable(policy)
    assert type(policy.model).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
