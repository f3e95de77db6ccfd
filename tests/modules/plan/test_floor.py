"""The floor's counts against loops over tokens."""

import pytest
from transformers import Qwen2Config

from src.modules.plan.memory import Shape, shape_of
from src.modules.plan.speed import CARDS, batch_phases, find_card, reading, updating, writing

PROMPTS, N, NEW = [3, 5], 2, 4


@pytest.fixture
def shape() -> Shape:
    sizes = {"hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return shape_of(Qwen2Config(vocab_size=11, **sizes))


def test_sampling_counts_every_product_once(shape: Shape) -> None:
    layers, heads, d = 2, 4, 2
    matrices, head = layers * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 5), 11 * 8
    pair = layers * heads * 4 * d  # query times key, and weight times value
    flops, read = 0, matrices  # the prompts are read at once
    for prompt in PROMPTS:
        flops += sum(2 * matrices + pair * (position + 1) for position in range(prompt))
        for token in range(NEW):
            flops += N * (2 * matrices + 2 * head + pair * (prompt + token + 1))
    for token in range(NEW):
        read += matrices + head
        for prompt in PROMPTS:
            read += layers * 2 * 2 * d * (prompt + N * (token + 1))
    counted = reading(shape, PROMPTS, 4), writing(shape, PROMPTS, N, NEW, 4)
    assert sum(part.bytes for part in counted) == 4 * read
    assert sum(part.flops for part in counted) == flops


def test_phases_of_a_batch(shape: Shape) -> None:
    phases = batch_phases(shape, PROMPTS, N, [2, 2, 6], NEW, half=True)
    assert [phase.what for phase in phases] == ["reading the prompts", "writing the rationales", "updating"]
    assert phases[0].flops == reading(shape, [*PROMPTS, 2, 2, 6], 2).flops
    together = batch_phases(shape, [*PROMPTS, 2, 2, 6], 1, [], NEW, half=True)[1]  # the same steps serve both kinds
    apart = batch_phases(shape, PROMPTS, 1, [2, 2, 6], NEW, half=True)[1]
    assert (apart.flops, apart.bytes) == (together.flops, together.bytes)
    full, held = (updating(own, [phases[0]], 1, False).flops for own in (shape, Shape(**{**vars(shape), "trained": 0})))
    assert (full, held) == (3 * phases[0].flops, 2 * phases[0].flops)
    more = batch_phases(shape, PROMPTS, N, [2, 2, 6], NEW, half=True, reference=True, pathwise=True, checkpointing=True)
    assert more[2].what == "scoring by the reference"
    assert more[3].flops > 4 / 3 * phases[2].flops


def test_floor_of_the_published_setting() -> None:
    """64 prompts of 166 tokens, 512 rationales of 128 tokens, 1.5 B parameters on an H100: some 4 ms a step."""
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    own = shape_of(Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **sizes))
    seconds = writing(own, [166] * 64, 8, 128, 2).seconds(CARDS["h100"], half=True)
    assert 1e-3 < seconds / 128 < 4e-3


def test_cards() -> None:
    assert find_card("h100").bandwidth == 3.35e12
    with pytest.raises(ValueError, match=r"plan\.card=v100 is not known: it is h100, h200, a100, l40s, rtx4090"):
        find_card("v100")
