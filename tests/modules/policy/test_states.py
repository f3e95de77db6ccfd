import pytest
import torch
from torch import nn

from src.modules.policy.pooling import states_at
from tests.builders import small_policy, some_rollouts


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_they_are_those_that_transformers_lists(layer: int) -> None:
    policy = small_policy()
    ids = some_rollouts(policy).input_ids
    listed = policy.model(input_ids=ids, output_hidden_states=True).hidden_states
    last, states = states_at(policy.model.base_model, layer, input_ids=ids)
    torch.testing.assert_close(last, listed[-1])
    torch.testing.assert_close(states, listed[layer])
    assert not policy.model.base_model.layers[-1]._forward_pre_hooks


def test_a_backbone_that_does_not_show_its_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy.layer=-2: Linear has no `layers`"):
        states_at(nn.Linear(2, 2), -2)
