"""Estimates what a device must hold, in bytes, from a model's config; pure arithmetic, from above, not a measurement.

Texts and rationales count at their longest. Counted is what this project's code keeps with rollout=hf, AdamW and float32 weights;
not counted are the CUDA context and the allocator's losses, some 2 GiB.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from src.modules.policy.lora import add_lora
from src.modules.policy.packaged import local_path

_LOGITS_AT_A_TIME, _LEAST_TOKENS = 2**26, 64  # of src/modules/policy/logprobs.py on a GPU


@dataclass(frozen=True)
class Shape:
    """Numbers of a causal language model.

    Attributes:
        parameters: all, tied ones once, adapters included.
        trained: those with gradients.
        embedding: of the token embeddings, V * D.
        head_trained: whether the output layer has gradients.
        layer: parameters of one layer.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in the model's config.
    """

    parameters: int
    trained: int
    embedding: int
    head_trained: bool
    layer: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class Work:
    """The shares of a rollout batch, and the sizes of a device's computation.

    Attributes:
        nodes, devices: N = nodes * devices ranks.
        strategy: `one`, `ddp` or `fsdp`.
        instances: B of all ranks.
        rollouts, negatives: K and M.
        learned: roles with K rollouts.
        updates: optimizer steps per rollout batch.
        prompt, rationale: longest, in tokens.
        tokens: of a micro-batch.
        engine_tokens: whose keys and values rollout=hf holds at a time; 0 for another engine.
        half: whether arithmetic is in bfloat16 (autocast).
        token_credit: whether embeddings after every token are kept.
        checkpointing: whether activations inside a layer are recomputed.
        gathered: bytes of a weight that `trainer=fsdp` gathers.
        copies: of the weights beside the policy (a reference, a frozen encoder).
        reference: whether a reference scores the rationales.
        pathwise: whether queries and negatives take part in the update.
    """

    nodes: int
    devices: int
    strategy: str
    instances: int
    rollouts: int
    negatives: int
    learned: tuple[str, ...]
    updates: int
    prompt: int
    rationale: int
    tokens: int
    engine_tokens: int
    half: bool
    token_credit: bool
    checkpointing: bool
    copies: int
    reference: bool = False
    pathwise: bool = False
    gathered: int = 4

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def share(self) -> int:
        """Instances of a rank."""
        return self.instances // self.ranks

    def calls(self) -> tuple[tuple[int, int], ...]:
        """Returns (texts, rollouts of each) of a rank's calls to the rollout engine."""
        texts = {"positive": self.share, "query": self.share, "negative": self.share * self.negatives}
        rest = sum(count for role, count in texts.items() if role not in self.learned)
        return tuple((texts[role], self.rollouts) for role in self.learned) + (((rest, 1),) if rest else ())


@dataclass(frozen=True)
class Row:
    """One part of the memory: its name, its bytes, and their arithmetic."""

    what: str
    bytes: float
    arithmetic: str


# ---- the model


def find_config(path: str, shapes: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the config of a folder, of a published backbone in the table `shapes`, or of a model on the hub.

    Raises:
        FileNotFoundError: none of them.
    """
    published: dict[str, dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(shapes))  # type: ignore[assignment]
    if path in published:
        return AutoConfig.for_model(**published[path])
    try:
        return AutoConfig.from_pretrained(local_path(path), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"no config.json for {path!r}: give policy.path a folder that has one (it alone is enough for dry_run), a name of {shapes}, or "
            f"a hub name on a machine that reaches the hub ({str(error).splitlines()[0]})"
        ) from error


def shape_of(config: PreTrainedConfig, train_embeddings: bool = True, lora: LoraConfig | None = None) -> Shape:
    """Counts the parameters of a model built on the meta device."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    model.get_input_embeddings().requires_grad_(train_embeddings)
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora)
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        parameters=_count(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embedding=_count(model.get_input_embeddings()),
        head_trained=model.get_output_embeddings().weight.requires_grad,
        layer=_count(model.base_model.layers[0]),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- its memory


def always(shape: Shape, work: Work) -> list[Row]:
    """Returns what is held from the first step on."""
    sharded = work.strategy == "fsdp"
    parts, over = (work.ranks, f" / {work.ranks}") if sharded else (1, "")
    p, t = shape.parameters, shape.trained
    rows = [Row("weights", 4 * p / parts, f"4 B x {p:,}{over}"), Row("AdamW's two moments", 8 * t / parts, f"8 B x {t:,}{over}")]
    if work.copies:
        rows.append(Row("reference, frozen encoder", 4 * p * work.copies, f"{work.copies} x 4 B x {p:,}"))
    return rows if sharded else [*rows, *of_engine(shape, work)]


def of_engine(shape: Shape, work: Work) -> list[Row]:
    """Returns what rollout=hf allocates to write: keys and values, and the layers' weights in bfloat16.

    On a GPU it keeps them from batch to batch, unless weights are sharded.
    """
    if not work.engine_tokens:
        return []
    width, each = shape.kv_heads * shape.head_dim, 4 if work.half else 8
    prompts, sequences = max(_calls(work), key=lambda call: call[0] * work.prompt + call[1] * work.rationale)
    positions = prompts * work.prompt + sequences * work.rationale
    how = f"({prompts} prompts x {work.prompt} + {sequences} x {work.rationale} tokens) x {shape.layers} layers x {width} x {each} B"
    rows = [Row("cache of keys and values", positions * shape.layers * width * each, how)]
    if work.half and work.strategy != "fsdp":
        layers = shape.layers * shape.layer
        rows.append(Row("layers in bfloat16", 2 * layers, f"2 B x {layers:,} (rollout.cast_weights)"))
    return rows


def _calls(work: Work) -> list[tuple[int, int]]:
    """Returns, of each call of the engine, how many prompts are written about at a time, and how many sequences that is."""
    calls = []
    for texts, n in work.calls():
        prompts = min(texts, max(1, work.engine_tokens // (work.prompt + n * work.rationale)))
        calls.append((prompts, prompts * n))
    return calls


def while_sampling(shape: Shape, work: Work) -> list[Row]:
    """Returns what is held in addition while rationales are written."""
    rows = []
    if work.strategy == "fsdp" and work.ranks > 1:
        rows.append(Row("weights, gathered", work.gathered * shape.parameters, f"{work.gathered} B x {shape.parameters:,}"))
    if not work.engine_tokens:
        return rows
    calls = _calls(work)
    if work.strategy == "fsdp":
        rows += of_engine(shape, work)
    read = max(prompts for prompts, _ in calls) * work.prompt
    per_read = 14 * shape.hidden + (8 if work.half else 16) * shape.intermediate
    rows.append(Row("reading the prompts", read * per_read, f"{read:,} tokens x {per_read:,} B of one layer"))
    most = min(max(sequences for _, sequences in calls), max(_LEAST_TOKENS, _LOGITS_AT_A_TIME // shape.vocabulary))
    rows.append(Row("logits", 16 * most * shape.vocabulary, f"{most} at a time x {shape.vocabulary:,} x 16 B (four copies)"))
    if work.token_credit:
        held = sum(texts * n for texts, n in work.calls()) * (work.rationale + 1) * shape.hidden * 4
        rows.append(Row("embeddings after every token", held, f"rollouts x {work.rationale + 1} x {shape.hidden} x 4 B"))
    return rows


def while_updating(shape: Shape, work: Work) -> list[Row]:
    """Returns what is held in addition when the backward pass of the last micro-batch starts."""
    t = shape.trained
    rows = [Row("gradients", 4 * t, f"4 B x {t:,}, unsharded until ranks exchange them")]
    if work.strategy == "fsdp" and work.ranks > 1:
        rows.append(Row("gradients, sharded", 4 * t / work.ranks, f"4 B x {t:,} / {work.ranks}"))
        gathered = work.gathered * (shape.parameters - shape.layers * shape.layer + 2 * shape.layer)
        rows.append(Row("weights, gathered in part", gathered, f"{work.gathered} B x (all but the layers + 2 x {shape.layer:,})"))
    kept = 1 if work.checkpointing else shape.layers
    if work.half:
        how = f"2 B x {kept} layers x {shape.layer:,}, kept for the backward pass"
        rows.append(Row("weights in bfloat16", 2 * kept * shape.layer, how))
    each = per_token(shape, work.half)
    rows.append(Row("activations", kept * work.tokens * each, f"{kept} layers x {work.tokens:,} tokens x {each:,} B"))
    if work.checkpointing:
        rows.append(Row("states between layers", shape.layers * work.tokens * 4 * shape.hidden, "layers x tokens x hidden x 4 B"))
    together = work.rollouts * (work.prompt + work.rationale)
    width = shape.heads * shape.head_dim * (2 if work.half else 4)
    how = f"{work.rollouts} x ({work.prompt} + {work.rationale}) tokens of one layer x {width:,} B x 4 (keys, values, gradients)"
    rows.append(Row("attention of one prompt", 4 * together * width, how))
    head = (8 if shape.head_trained else 2) * shape.embedding
    how = f"{_LOGITS_AT_A_TIME:,} at a time x 16 B, and {head / 2**20:,.0f} MiB of the output layer"
    return [*rows, Row("logits", 16 * _LOGITS_AT_A_TIME + head, how)]


def per_token(shape: Shape, half: bool) -> int:
    """Returns bytes that a layer keeps of a token for its backward pass; tests/modules/plan/test_memory.py measures them.

    Under autocast: inputs and outputs of two norms (float32), inputs of seven projections, queries, keys, values, attention's
    output, and the factors of the gated unit (bfloat16).
    """
    attended = shape.heads * shape.head_dim
    if half:
        return 26 * shape.hidden + 8 * shape.intermediate + 10 * attended + 4 * shape.heads + 8
    return 24 * shape.hidden + 16 * shape.intermediate + 20 * attended + 4 * shape.heads + 8
