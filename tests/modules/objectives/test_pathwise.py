"""The pathwise term's parts against finite differences and against pooling of padded rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from src.modules.objectives.pathwise import first_of_group, pathwise_loss, reward_and_gradients
from src.modules.objectives.rewards import document, listwise, paper, unsupervised
from src.modules.types import ROLES, Embeddings


def random_embeddings(m: int, b: int = 3, k: int = 2, d: int = 5) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    return Embeddings.normalised(*(torch.randn(*shape, d, generator=generator, dtype=torch.float64) for shape in ((b,), (b, k), (b, m))))


@pytest.mark.parametrize(("reward", "m"), [(paper, 2), (document, 2), (listwise, 2), (listwise, 0), (unsupervised, 0)])
def test_reward_gradients_are_finite_differences(reward: Any, m: int) -> None:
    e = random_embeddings(m)
    total, found = reward_and_gradients(reward, e)
    torch.testing.assert_close(total.total.double(), reward(e).total.double(), atol=1e-5, rtol=1e-5)
    step = 1e-5
    for role in ROLES:
        exact = torch.zeros_like(getattr(e, role))
        for place in range(exact.numel()):
            values = []
            for sign in (step, -step):
                moved = getattr(e, role).clone()
                moved.view(-1)[place] += sign
                values.append(reward(replace(e, **{role: moved})).total.mean(dim=1).sum())
            exact.view(-1)[place] = (values[0] - values[1]) / (2 * step)
        ours = found.by_role[role]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("role", ROLES)
def test_reward_gradients_of_chosen_roles(role: Any) -> None:
    e = random_embeddings(2)
    with torch.no_grad():  # a graph is built inrole
        (reward, found), everything = reward_and_gradients(listwise, e, [role]), reward_and_gradients(listwise, e)[1]
    assert not reward.total.requires_grad
    for other in ROLES:
        assert not found.by_role[other].requires_grad
        assert float(everything.by_role[other].norm()) > 0
        assert torch.equal(found.by_role[other], everything.by_role[other] * (other == role))


def test_loss_gradient_goes_through_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    h, g = (torch.randn(4, 6, generator=generator, dtype=torch.float32) for _ in range(2))
    h.requires_grad_()
    (ours,) = torch.autograd.grad(pathwise_loss(h, g), h)
    unit = h.detach() / h.detach().norm(dim=1, keepdim=True)
    along = (g * unit).sum(dim=1, keepdim=True) * unit
    torch.testing.assert_close(ours, -(g - along) / h.detach().norm(dim=1, keepdim=True))


def test_first_of_a_group_has_the_gradient() -> None:
    spread = first_of_group(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3)
    assert spread.tolist() == [[1, 2], [0, 0], [0, 0], [3, 4], [0, 0], [0, 0]]
