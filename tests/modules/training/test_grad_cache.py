"""The gradient taken part by part against that of one graph over everything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.modules.objectives.info_nce import info_nce
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.training.grad_cache import RandomState, cached_gradient
from src.modules.types import Rollouts, without_rationales
from tests.builders import SENTENCES, flat, off, small_policy

CPU = torch.device("cpu")


def loss(embeddings: Tensor) -> Tensor:
    queries, documents = embeddings.chunk(2)
    return info_nce(queries, documents, torch.arange(len(queries)), 0.05)


def texts(policy: Policy) -> Rollouts:
    short = [text[: 8 + 7 * i] for i, text in enumerate(SENTENCES)]
    return without_rationales(PromptRenderer(policy.tokenizer, "Name the terms.", 128)([*short, *SENTENCES]), policy.pad_id)


def gradient_of(policy: Policy, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of `run`, from one random state."""
    policy.zero_grad()
    torch.manual_seed(3)
    value = run()
    return value, flat(policy.parameters())


def one_graph(policy: Policy, sequences: Rollouts, parts: list[Tensor]) -> Tensor:
    value = loss(torch.cat([policy.embed(sequences[rows]) for rows in parts]))
    value.backward()
    return value.detach()


def cached(policy: Policy, sequences: Rollouts, parts: list[Tensor]) -> Tensor:
    return cached_gradient(lambda rows: policy.embed(sequences[rows]), parts, loss, Tensor.backward, CPU)[0]


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert off(one[1], other[1]) < 1e-5


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, False), (0.4, False), (0.4, True)])
def test_cached_gradient_is_that_of_one_graph(size: int, dropout: float, checkpointing: bool) -> None:
    policy = small_policy(attention_dropout=dropout).train()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    sequences = texts(policy)
    parts = list(torch.arange(len(sequences)).split(size))
    graph = gradient_of(policy, lambda: one_graph(policy, sequences, parts if dropout else [torch.cat(parts)]))
    after_graph = torch.rand(1)
    assert_same(graph, gradient_of(policy, lambda: cached(policy, sequences, parts)))
    assert torch.equal(torch.rand(1), after_graph)  # the next batch draws on from where this one's dropout ended
    if dropout:
        policy.eval()
        assert not torch.allclose(gradient_of(policy, lambda: cached(policy, sequences, parts))[0], graph[0], atol=1e-3)


def test_other_dropout_gives_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy(attention_dropout=0.4).train()
    sequences = texts(policy)
    parts = list(torch.arange(len(sequences)).split(4))
    graph = gradient_of(policy, lambda: one_graph(policy, sequences, parts))
    monkeypatch.setattr(RandomState, "again", lambda _: torch.random.fork_rng([]))
    with pytest.raises(AssertionError):
        assert_same(graph, gradient_of(policy, lambda: cached(policy, sequences, parts)))


def test_one_part_is_alive_at_a_time() -> None:
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, upstream: Tensor) -> Tensor:
            nonlocal alive
            alive -= 1
            return upstream * 2

    weight = torch.ones(3, 2, requires_grad=True)

    def embed(part: Tensor) -> Tensor:
        nonlocal alive, most
        if torch.is_grad_enabled():
            alive += 1
            most = max(most, alive)
        return Counted.apply(part @ weight)

    cached_gradient(embed, list(torch.randn(6, 2, 3)), loss, Tensor.backward, CPU)
    assert (alive, most) == (0, 1)


def test_bfloat16_autocast_keeps_the_gradient() -> None:
    policy = small_policy().train()
    sequences = texts(policy)
    parts = list(torch.arange(len(sequences)).split(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = gradient_of(policy, lambda: one_graph(policy, sequences, parts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradient_of(policy, lambda: cached(policy, sequences, parts))
    assert off(ours[1], graph[1]) < 2e-2
