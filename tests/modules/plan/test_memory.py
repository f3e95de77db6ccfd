"""The memory plan's arithmetic against what autograd keeps and against published sizes."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from src.modules.plan.memory import find_config, per_token, shape_of
from src.modules.policy.attention import masked
from src.modules.policy.attention.masked import checkpoint_contexts
from src.modules.policy.model import Policy
from src.modules.types import Rollouts
from tests.builders import small_tokenizer
from tests.conftest import ROOT

SHAPES = ROOT / "configs" / "shapes" / "published.yaml"
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
}
"""Parameters, from the model cards."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    settings = dict(OmegaConf.load(SHAPES)[name])
    known = AutoConfig.for_model(settings["model_type"]).to_dict()
    assert set(settings) <= set(known), "a key that the config class does not know"
    assert shape_of(find_config(name, SHAPES)).parameters == PUBLISHED[name]


def test_published_experiments_have_shapes() -> None:
    named = {OmegaConf.load(file).get("policy", {}).get("path") for file in (ROOT / "configs" / "experiment").glob("*_*sup.yaml")}
    assert {name for name in named if name} == set(PUBLISHED)


def test_config_without_weights_is_enough(tmp_path: Path) -> None:
    config = Qwen2Config(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    model = Qwen2ForCausalLM(config)
    shape = shape_of(find_config(str(tmp_path), SHAPES), train_embeddings=False)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.parameters - shape.trained == shape.embedding == 3200
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())


def test_missing_config_is_one_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json for 'some/model': give policy\.path") as error:
        find_config("some/model", SHAPES)
    assert "\n" not in str(error.value)


G, K, P, R = 2, 4, 40, 60


def kept(model: PreTrainedModel, half: bool, k: int = K, r: int = R) -> int:
    """Bytes that autograd keeps of an update over G prompts with k rationales of r tokens each, without parameters."""
    policy = Policy(model, small_tokenizer()).train()
    n = G * k
    ones = torch.ones(n, dtype=torch.long)
    rollouts = Rollouts(torch.randint(5, 300, (n, P + r)), 0 * ones, P * ones, (P + r) * ones, ones.bool())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
    with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(rollouts, torch.arange(G).repeat_interleave(k))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


def model_of(layers: int, heads: int, hidden: int, intermediate: int) -> PreTrainedModel:
    """A random model with as many keys as queries, as GPU kernels have after repeating grouped ones."""
    widths = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = Qwen2Config(vocab_size=400, num_hidden_layers=layers, max_position_embeddings=256, tie_word_embeddings=True, **widths)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("widths", [(4, 64, 256), (8, 64, 512), (4, 128, 192)])
def test_activations_match_autograd(widths: tuple[int, int, int], half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "_SHORT", 0)  # a GPU makes no float32 copies of short queries, keys and values
    small, large = (model_of(layers, *widths) for layers in (1, 3))
    a_layer = (kept(large, half) - kept(small, half)) / 2
    shape, tokens = shape_of(large.config), G * (P + K * R)
    estimate = tokens * per_token(shape, half) + (2 * shape.layer if half else 0)
    assert 0.9 * estimate <= a_layer <= estimate


def test_memory_depends_on_tokens_not_rationales() -> None:
    few, many = (kept(model_of(2, 4, 64, 256), False, k, 240 // k) for k in (2, 60))
    assert many == pytest.approx(few, rel=0.02)


def test_checkpointing_keeps_one_state_per_layer() -> None:
    small, large = (model_of(layers, 4, 64, 256) for layers in (1, 3))
    for model in (small, large):
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(model)})
    assert (kept(large, True) - kept(small, True)) / 2 == G * (P + K * R) * 4 * 64
