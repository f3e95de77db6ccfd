import pytest
import torch

from src.modules.prompt.renderer import Prompts
from src.modules.types import Rollouts, join

PAD = 0


def example() -> Rollouts:
    """Two prompts (`<u> a b </u> <x>`, `<u> c </u> <x>`), the first with a rationale of 2, the second with none."""
    prompts = Prompts(
        ids=(torch.tensor([1, 10, 11, 2, 3]), torch.tensor([1, 12, 2, 3])),
        text_starts=torch.tensor([1, 1]),
        text_lengths=torch.tensor([2, 1]),
    )
    logprobs = [torch.tensor([-0.5, -0.25]), torch.zeros(0)]
    return join(prompts, [torch.tensor([20, 9]), torch.zeros(0, dtype=torch.int64)], torch.tensor([True, False]), PAD, logprobs)


def test_join_pads_right_and_keeps_every_id() -> None:
    rollouts = example()
    assert rollouts.input_ids.tolist() == [[1, 10, 11, 2, 3, 20, 9], [1, 12, 2, 3, PAD, PAD, PAD]]
    assert rollouts.prompt_lengths.tolist() == [5, 4]
    assert rollouts.lengths.tolist() == [7, 4]
    assert rollouts.rationale_lengths.tolist() == [2, 0]
    assert [ids.tolist() for ids in rollouts.rationales()] == [[20, 9], []]
    assert len(rollouts) == 2
    assert rollouts.logprobs is not None
    assert rollouts.logprobs.tolist() == [[0, 0, 0, 0, 0, -0.5, -0.25], [0] * 7]


def test_masks() -> None:
    rollouts = example()
    assert rollouts.attention_mask.int().tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert rollouts.pooling_mask.int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]
    assert rollouts.rationale_mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7]


def test_join_without_logprobs_or_rationales() -> None:
    prompts = Prompts((torch.tensor([1]), torch.tensor([2])), torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert join(prompts, [torch.tensor([3])] * 2, torch.tensor([True, True]), PAD).logprobs is None
    with pytest.raises(ValueError, match="shorter"):
        join(prompts, [torch.tensor([3])], torch.tensor([True, True]), PAD)


@pytest.mark.parametrize("index", [slice(1, 2), torch.tensor([1]), torch.tensor([False, True])])
def test_selection_is_padded_to_its_longest(index: slice | torch.Tensor) -> None:
    chosen = example()[index]
    assert chosen.input_ids.tolist() == [[1, 12, 2, 3]]
    assert chosen.finished.tolist() == [False]
    assert chosen.logprobs is not None
    assert chosen.logprobs.shape == (1, 4)


def test_selection_repeats_and_moving_keeps() -> None:
    rollouts = example()
    assert torch.equal(rollouts[torch.tensor([1, 0, 1])].lengths, torch.tensor([4, 7, 4]))
    assert torch.equal(rollouts.to("cpu").input_ids, rollouts.input_ids)
    assert rollouts.to("cpu").embeddings is None
