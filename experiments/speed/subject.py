"""What the benchmarks run on: the shipped tiny policy, docstrings, and rationales that all have one length."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.datamodules.docstrings import collect
from src.modules.encoder.export import load_policy
from src.modules.policy.loading import load_tokenizer
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.records import Triplet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "experiments" / "tiny_policy" / "weights"


def unending(policy: Policy) -> Policy:
    """The same policy with an end token that it has no logit for: every rationale runs to its limit, in any engine.

    No engine has to do anything about it, as it would to suppress a token that could be sampled.
    """
    tokenizer, model = policy.tokenizer, policy.model
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    end = int(tokenizer.eos_token_id)
    if end < model.config.vocab_size:
        raise ValueError(f"the new token's id {end} is within the model's vocabulary of {model.config.vocab_size}: it could be sampled")
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    return policy


def random_policy(config: "PreTrainedConfig") -> Policy:
    """A policy of a model's shape with random weights in float32, without an end, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(POLICY))
    tokenizer.add_tokens([f"<|{i}|>" for i in range(config.vocab_size - len(tokenizer))])  # so that the end token lies outside
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return unending(Policy(model, tokenizer))


def unending_policy(path: Path | str = POLICY) -> tuple[Policy, PromptRenderer]:
    """A policy of a folder, on the GPU if there is one, without an end; and its renderer."""
    import torch

    policy, settings = load_policy(path)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    return unending(policy), PromptRenderer(policy.tokenizer, settings.instruction, settings.max_prompt_tokens)


def triplets(renderer: PromptRenderer, count: int, packages: Sequence[str], seed: int = 0) -> list[Triplet]:
    """Docstrings as records with a negative each; no text is so long that it would be cut.

    Raises:
        ValueError: the packages have fewer.
    """
    docs = collect(packages, ROOT / "data" / "cache")
    random.Random(seed).shuffle(docs)
    uncut = renderer([doc.body for doc in docs]).text_lengths < renderer.max_text_tokens
    docs = [doc for doc, fits in zip(docs, uncut.tolist(), strict=True) if fits]
    if len(docs) <= count:
        raise ValueError(f"{', '.join(packages)}: {len(docs)} docstrings fit into a prompt, {count + 1} are needed; name more packages")
    return [Triplet(doc.id, doc.summary, doc.body, (docs[i + 1].body,)) for i, doc in enumerate(docs[:count])]
