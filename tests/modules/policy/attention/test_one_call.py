"""One call for the packed row against the group loop and against a dense mask written from its definition."""

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from src.modules.policy.attention import one_call
from src.modules.policy.attention.one_call import BLOCK, one_call_attention, packed_block_mask
from src.modules.policy.attention.packed import grouped_attention
from src.modules.policy.packing import PackedRollouts, pack
from src.modules.types import Rollouts

Groups = list[tuple[int, list[int]]]
GROUPS: Groups = [(90, [40, 0, 65]), (20, [7]), (300, [0]), (1, [200, 130]), (31, [1, 2, 3, 4])]
"""(tokens of the prompt, tokens of each rationale), over several blocks."""


def packed_of(groups: Groups, device: str = "cpu") -> PackedRollouts:
    prompts = torch.tensor([prompt for prompt, own in groups for _ in own])
    lengths = prompts + torch.tensor([length for _, own in groups for length in own])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    rollouts = Rollouts(ids, torch.zeros_like(prompts), prompts, lengths, torch.ones_like(prompts, dtype=torch.bool))
    return pack(rollouts.to(device), torch.tensor([i for i, (_, own) in enumerate(groups) for _ in own]))


def visible(groups: Groups, window: int = 2**20) -> Tensor:
    """[L, L] bool: a token sees a token of its group that is not behind it, is of the prompt or of its own rationale, and in the window."""
    tokens = []
    for group, (prompt, own) in enumerate(groups):
        tokens += [(group, -1, place) for place in range(prompt)]
        tokens += [(group, rationale, prompt + place) for rationale, length in enumerate(own) for place in range(length)]
    seen = [
        [g == h and k <= q and (s in (-1, r)) and j > i - window for k, (h, s, j) in enumerate(tokens)]
        for q, (g, r, i) in enumerate(tokens)
    ]
    return torch.tensor(seen)


def states(length: int, heads: int, kv_heads: int, d: int = 16, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    # as transformers has them: heads beside each other, transposed
    return [torch.randn(1, length, n, d, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_() for n in sizes]


def results(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighting of it."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 150), st.lists(st.integers(0, 150), min_size=1, max_size=3)), min_size=1, max_size=4))
def test_blocks_are_those_of_the_dense_mask(groups: Groups) -> None:
    packed = packed_of(groups)
    mask = packed.block_mask()
    blocks = blocks_of(mask, visible(groups))
    listed, full = listed_blocks(mask)
    assert torch.equal(listed, blocks.any(dim=2))
    assert torch.equal(full, blocks.all(dim=2))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.lists(st.integers(0, 300), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.integers(1, 600),
)
def test_blocks_within_a_window(groups: Groups, window: int) -> None:
    mask = packed_of(groups).block_mask(window)
    blocks = blocks_of(mask, visible(groups, window))
    listed, full = listed_blocks(mask)
    assert not (blocks.any(dim=2) & ~listed).any()  # of blocks with tokens of several sequences, some are listed in vain
    assert not (full & ~blocks.all(dim=2)).any()


@pytest.mark.parametrize("window", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK, 9 * BLOCK])
def test_blocks_out_of_sight_are_left_out(window: int) -> None:
    groups: Groups = [(4 * BLOCK, [BLOCK])]  # one sequence: blocks are exact
    mask = packed_of(groups).block_mask(window)
    blocks = blocks_of(mask, visible(groups, window))
    listed, full = listed_blocks(mask)
    assert torch.equal(listed, blocks.any(dim=2))
    assert torch.equal(full, blocks.all(dim=2))


def blocks_of(mask: BlockMask, expected: Tensor) -> Tensor:
    """[blocks, blocks, BLOCK * BLOCK] bool of the dense mask [L, L], which the function of `mask` is compared with."""
    length, padding = mask.shape[-1], mask.shape[-1] - len(expected)
    dense = F.pad(expected, (0, padding, 0, padding)) | torch.eye(length, dtype=torch.bool)
    place = torch.arange(length)
    assert torch.equal(mask.mask_mod(place, place, place[:, None], place[None]), dense)
    return dense.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2).flatten(2)


def listed_blocks(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The blocks that are computed, and those of them that are computed without a mask, [blocks, blocks] bool each."""
    listed = mask.to_dense()[0, 0].bool()
    full = torch.zeros_like(listed)
    for row, (count, order) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        full[row, order[:count].long()] = True
    return listed, full


@pytest.mark.parametrize("window", [None, 1, 60, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_one_call_is_the_group_loop(heads: int, kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # on a CPU torch refuses gradients, which its uncompiled form has
    packed = packed_of(GROUPS)
    inputs = states(packed.input_ids.shape[1], heads, kv_heads)
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=visible(GROUPS, window or 2**20), scale=0.3, enable_gqa=True)
    expected = results(dense, inputs)
    loop = grouped_attention(*inputs, packed.groups, 0.3, window=window)
    for output in (one_call_attention(*inputs, packed.block_mask(window), 0.3), loop):
        torch.testing.assert_close(results(output, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("windows", [(None,), (60, 150)])
def test_other_lengths_are_not_compiled_again(windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(one_call, "flex_attention", torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=counted))
    for groups in (GROUPS, GROUPS[:1], GROUPS[2:], [(5, [3])], GROUPS * 2):
        packed = packed_of(groups)
        for window in windows:
            with torch.no_grad():
                one_call_attention(*states(packed.input_ids.shape[1], 4, 2), packed.block_mask(window), 0.3)
    assert counted.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_call_is_the_group_loop(dtype: torch.dtype, window: int | None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = []
    for groups in (GROUPS * 3, GROUPS, [(5, [3]), (700, [128, 1])], GROUPS * 7):
        packed = packed_of(groups, "cuda")
        inputs = states(packed.input_ids.shape[1], 12, 2, 64, "cuda", dtype)
        ours = results(one_call_attention(*inputs, packed.block_mask(window), 0.125), inputs)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        theirs = results(grouped_attention(*exact, packed.groups, 0.125, window=window), exact)
        for one, other in zip(ours, theirs, strict=True):
            assert float((one.float() - other).norm() / other.norm()) < (2e-3 if dtype is torch.float32 else 1e-2)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled == [1] * 4  # for all lengths


@pytest.mark.gpu
def test_the_mask_needs_no_square_of_the_length() -> None:
    until = torch.arange(2**17, device="cuda") + 1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_block_mask(until)
    assert torch.cuda.max_memory_allocated() - before < 2**28  # a square of bytes would be 2**34
