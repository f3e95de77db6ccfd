"""What a device must hold, in bytes, and the arithmetic that says so. Pure functions; an estimate from above, not a measurement.

Texts and rationales are taken to be as long as they may be. Counted is what this project's code keeps, with rollout=hf, AdamW
and weights in float32; not counted are the CUDA context and what the allocator loses, some 2 GiB.
"""

from dataclasses import dataclass

from src.modules.plan.model_shape import Shape

_LOGITS_AT_A_TIME, _LEAST_TOKENS = 2**26, 64  # of src/modules/policy/logprobs.py on a GPU


@dataclass(frozen=True)
class Load:
    """What a device does.

    Attributes:
        ranks: N devices.
        sharded: whether weights are cut over them.
        half: whether arithmetic is in bfloat16 (autocast).
        calls: of the rollout engine, (texts, rollouts of each) on this device.
        at_once: tokens whose keys and values are held while rationales are written; 0 where another engine samples.
        prompt, rationale: longest, in tokens.
        rollouts: K, that share a prompt in an update.
        tokens: of a micro-batch.
        prefixes: whether embeddings after every token are kept.
        checkpointing: whether a layer's inner states are computed again.
        copies: whole copies of the weights that stand beside the policy (a reference, a frozen encoder).
    """

    ranks: int
    sharded: bool
    half: bool
    calls: tuple[tuple[int, int], ...]
    at_once: int
    prompt: int
    rationale: int
    rollouts: int
    tokens: int
    prefixes: bool
    checkpointing: bool
    copies: int


@dataclass(frozen=True)
class Row:
    """Attributes: what is held; how many bytes; the arithmetic."""

    what: str
    bytes: float
    how: str


def always(shape: Shape, load: Load) -> list[Row]:
    """Held from the first step on."""
    cut, over = (load.ranks, f" / {load.ranks}") if load.sharded else (1, "")
    p, t = shape.parameters, shape.trained
    rows = [
        Row("weights", 4 * p / cut, f"4 B x {p:,}{over}"),
        Row("AdamW's two moments", 8 * t / cut, f"8 B x {t:,}{over}"),
    ]
    if load.ranks > 1 and not load.sharded:
        rows.append(Row("DDP's buckets", 4 * t, f"4 B x {t:,}"))
    if load.copies:
        rows.append(Row("reference, frozen encoder", 4 * p * load.copies, f"{load.copies} x 4 B x {p:,}"))
    return rows


def while_sampling(shape: Shape, load: Load) -> list[Row]:
    """Held while rationales are written."""
    rows = []
    if load.sharded and load.ranks > 1:
        rows.append(Row("weights, gathered whole", 4 * shape.parameters, f"4 B x {shape.parameters:,}"))
    if not load.at_once:
        return rows
    width, each = shape.kv_heads * shape.head_dim, 4 if load.half else 8
    calls = [
        (prompts, prompts * n)
        for texts, n in load.calls
        for prompts in [min(texts, max(1, load.at_once // (load.prompt + n * load.rationale)))]
    ]
    prompts, sequences = max(calls, key=lambda call: call[0] * load.prompt + call[1] * load.rationale)
    positions = prompts * load.prompt + sequences * load.rationale
    rows.append(
        Row(
            "cache of keys and values",
            positions * shape.layers * width * each,
            f"({prompts} prompts x {load.prompt} + {sequences} x {load.rationale} tokens) x {shape.layers} layers x {width} x {each} B",
        )
    )
    read = max(prompts for prompts, _ in calls) * load.prompt
    a_token = 14 * shape.hidden + (8 if load.half else 16) * shape.intermediate
    rows.append(Row("reading the prompts", read * a_token, f"{read:,} tokens x {a_token:,} B of one layer"))
    most = min(max(rows_ for _, rows_ in calls), max(_LEAST_TOKENS, _LOGITS_AT_A_TIME // shape.vocabulary))
    rows.append(Row("logits", 16 * most * shape.vocabulary, f"{most} at a time x {shape.vocabulary:,} x 16 B (four copies)"))
    if load.prefixes:
        held = sum(texts * n for texts, n in load.calls) * (load.rationale + 1) * shape.hidden * 4
        rows.append(Row("embeddings after every token", held, f"rollouts x {load.rationale + 1} x {shape.hidden} x 4 B"))
    return rows


def while_updating(shape: Shape, load: Load) -> list[Row]:
    """Held where the backward pass of the last micro-batch begins."""
    t = shape.trained
    rows = [Row("gradients", 4 * t, f"4 B x {t:,}, whole until ranks exchange them")]
    if load.sharded and load.ranks > 1:
        rows.append(Row("gradients, cut", 4 * t / load.ranks, f"4 B x {t:,} / {load.ranks}"))
        gathered = 4 * (shape.parameters - shape.layers * shape.layer) + 8 * shape.layer
        rows.append(Row("weights, gathered in part", gathered, f"4 B x (all but the layers + 2 x {shape.layer:,})"))
    kept = 1 if load.checkpointing else shape.layers
    if load.half:
        rows.append(
            Row("weights in bfloat16", 2 * kept * shape.layer, f"2 B x {kept} layers x {shape.layer:,}, kept for the backward pass")
        )
    a_token = per_token(shape, load.half)
    rows.append(Row("activations", kept * load.tokens * a_token, f"{kept} layers x {load.tokens:,} tokens x {a_token:,} B"))
    if load.checkpointing:
        rows.append(Row("states between layers", shape.layers * load.tokens * 4 * shape.hidden, "layers x tokens x hidden x 4 B"))
    together = load.rollouts * (load.prompt + load.rationale)
    width = shape.heads * shape.head_dim * (2 if load.half else 4)
    how = f"{load.rollouts} x ({load.prompt} + {load.rationale}) tokens of one layer x {width:,} B x 4 (keys, values, gradients)"
    rows.append(Row("attention of one prompt", 4 * together * width, how))
    logits = 16 * _LOGITS_AT_A_TIME
    head = (8 if shape.head_trained else 2) * shape.embedding
    rows.append(Row("logits", logits + head, f"{_LOGITS_AT_A_TIME:,} at a time x 16 B, and {head / 2**20:,.0f} MiB of the output layer"))
    return rows


def per_token(shape: Shape, half: bool) -> int:
    """Bytes that a layer keeps of each token for its backward pass.

    Under autocast: inputs of the two norms and what they make of them (float32), the inputs of seven projections, queries, keys,
    values and what attention makes of them, and what the gated unit multiplies (bfloat16). tests/modules/plan/test_memory.py counts them.
    """
    attended = shape.heads * shape.head_dim
    if half:
        return 26 * shape.hidden + 8 * shape.intermediate + 10 * attended + 4 * shape.heads + 8
    return 24 * shape.hidden + 16 * shape.intermediate + 20 * attended + 4 * shape.heads + 8
