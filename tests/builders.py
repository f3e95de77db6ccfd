"""Small real parts for tests: a tokenizer trained on a few sentences, a random Qwen2, rollouts of it, and modules in real fits."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from experiments.tiny_policy.policy import train_tokenizer
from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import document
from src.modules.objectives.shaping import ShapedRewards, shape_rewards
from src.modules.policy.lora import add_lora
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.hf import HFEngine
from src.modules.types import RoleRollouts, Rollouts, dummy_rollouts, join
from src.records import Triplet

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


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "untied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
}
WINDOWED: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # layers that see the last 8 tokens: all, or one of two
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2_window": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,  # a scale of scores that is not the usual one
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "tie_word_embeddings": False,
        },
    ),
}


def small_model(vocab_size: int, seed: int = 0, kind: str = "qwen2", **config: Any) -> Any:
    """Two layers of 32 with random weights, wide enough apart that outputs differ clearly; four heads, two of keys and values."""
    model, config_class, own = (KINDS | WINDOWED)[kind]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {**shape, "vocab_size": vocab_size, "max_position_embeddings": 256, "initializer_range": 0.2, **own, **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config_class(**settings)).eval()


def small_policy(encoder: str = "live", seed: int = 0, attention_dropout: float = 0.0) -> Policy:
    """Tokenizer and model of this module as a policy."""
    tokenizer = small_tokenizer()
    model = small_model(len(tokenizer), seed, attention_dropout=attention_dropout)
    return Policy(model, tokenizer, encoder)  # type: ignore[arg-type]


def some_rollouts(policy: Policy, rationale_lengths: tuple[int, ...] = (5, 0, 9, 1), seed: int = 0) -> Rollouts:
    """Rollouts with prompts of different lengths and random rationale ids, not sampled from the policy."""
    generator = torch.Generator().manual_seed(seed)
    texts = [SENTENCES[i % len(SENTENCES)][: 12 + 9 * i] for i in range(len(rationale_lengths))]
    prompts = PromptRenderer(policy.tokenizer, "Name the terms.", 128)(texts)
    ids = [torch.randint(5, len(policy.tokenizer), (length,), generator=generator) for length in rationale_lengths]
    return join(prompts, ids, torch.ones(len(ids), dtype=torch.bool), policy.pad_id)


# ---- training

TRIPLETS = [
    Triplet(f"file.jsonl:{i}", SENTENCES[i][:20], SENTENCES[i], (SENTENCES[(i + 1) % len(SENTENCES)][::-1],)) for i in range(len(SENTENCES))
]


def make(
    reward: Any = document,
    encoder: str = "live",
    algorithm: dict[str, Any] | None = None,
    engine: Any = None,
    pooling: str = "mean",
    layer: int = -1,
    lora: bool = False,
    ends_early: bool = False,
    **settings: Any,
) -> GRACE:
    """GRACE of a small policy.

    Args:
        engine: HFEngine with `max_new_tokens` if None.
        lora: adapters that are not zero are trained.
        ends_early: sixty tokens end a rationale, so that some are finished.
    """
    new_tokens = settings.pop("max_new_tokens", 6)
    module = GRACE(
        policy=small_policy(encoder),
        engine=engine or HFEngine(new_tokens),
        reward=reward,
        algorithm=Algorithm(**{"advantage": grpo, "loss": ppo_clip, **(algorithm or {})}),
        instruction="Name the terms.",
        **{"num_generations": 3, "learning_rate": 1e-3, "max_prompt_tokens": 100, "max_grad_norm": 1e9, **settings},
    )
    module.policy.pooling, module.policy.layer = pooling, layer  # type: ignore[assignment]
    module.settings = replace(module.settings, pooling=pooling, layer=layer)
    if ends_early:
        module.policy.model.generation_config.eos_token_id = list(range(5, 65))
    if lora:
        torch.manual_seed(0)
        add_lora(module.policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return module


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def flat(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None] | None = None) -> Tensor:
    """The gradients (by default `.grad`) as one vector, 0 where there is none."""
    pairs = [(p, p.grad) for p in parameters] if gradients is None else zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach().clone()).flatten() for p, g in pairs])


def weights(module: Any) -> Tensor:
    """All weights of the policy as one vector."""
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


def off(ours: Tensor, exact: Tensor) -> float:
    """The distance as a share of the exact vector's length."""
    return float((ours - exact).norm() / exact.norm())


class Watch(L.Callback):
    """Keeps the gradient that the optimiser sees in each update, as one vector, and the metrics of every batch."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.reports: list[Any] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(flat(trained(pl_module.policy)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.reports.append(pl_module.batch_metrics)


def quiet_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "callbacks": list(callbacks), **quiet, **settings})


def loader(batches: Sequence[Any]) -> Any:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: L.LightningModule, batches: Sequence[Any] = (TRIPLETS,), *callbacks: L.Callback, ckpt_path: Any = None, **settings: Any
) -> Watch:
    """Trains on these batches; returns what was seen."""
    watch = Watch()
    quiet_trainer(watch, *callbacks, **settings).fit(module, loader(batches), ckpt_path=ckpt_path, weights_only=True)
    return watch


class Inexact(HFEngine):
    """An engine whose log-probs are not the trainer's, as one of lower precision has them."""

    exact = False

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = super().generate(*args, **kwargs)
        noise = 0.3 * torch.randn(rollouts.input_ids.shape, generator=torch.Generator().manual_seed(0))
        return replace(rollouts, logprobs=rollouts.logprobs + noise * rollouts.rationale_mask)


class IdsAlone(HFEngine):
    """An engine that returns token ids alone, so that the trainer computes the rest."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        return replace(super().generate(*args, **kwargs), logprobs=None, embeddings=None, prefix_embeddings=None, prompt_embeddings=None)


def shaped(algorithm: Algorithm, rewards: Tensor, lengths: Tensor, finished: Tensor, divergence: Tensor | None = None) -> ShapedRewards:
    """Shapes rewards [G, K] of rationales with these lengths [G, K]; `divergence`, [G, K], is summed over their tokens."""
    by_token = None if divergence is None else divergence.unsqueeze(2)
    group = RoleRollouts(dummy_rollouts(0), (), rewards.unsqueeze(2), lengths, finished, divergence=by_token)
    return shape_rewards(algorithm, rewards, group, lambda units: units.squeeze(2))
