import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.modules.policy.logprobs import selected_logprobs
from tests.builders import flat, small_policy, some_rollouts, trained
from tests.oracles import logprobs_of_targets


def random_case(n: int, d: int, v: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 6),
    v=st.integers(1, 11),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk_tokens=st.sampled_from([1, 2, 3, 1024]),
    seed=st.integers(0, 10_000),
)
def test_values_and_gradients_are_the_oracles(n: int, d: int, v: int, temperature: float, chunk_tokens: int, seed: int) -> None:
    hidden, weight, targets = random_case(n, d, v, seed)
    fast, entropies = selected_logprobs(hidden, weight, targets, temperature, chunk_tokens)
    slow, expected_entropies = logprobs_of_targets(hidden, weight, targets, temperature)
    assert not entropies.requires_grad
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    fast_gradients = torch.autograd.grad((fast * upstream).sum(), (hidden, weight))
    slow_gradients = torch.autograd.grad((slow * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-5, atol=1e-5)


def test_backward_keeps_no_logits() -> None:
    hidden, weight, targets = random_case(60, 4, 500, seed=0)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        logprobs, _ = selected_logprobs(hidden, weight, targets, chunk_tokens=10)
    logprobs.sum().backward()
    assert max(shape.numel() for shape in kept) == weight.numel()


def test_bfloat16_changes_rounding_alone() -> None:
    hidden, weight, targets = random_case(40, 16, 300, seed=0)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprobs, _ = selected_logprobs(hidden, weight, targets, 0.7, chunk_tokens=7)
        results.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (hidden, weight))))
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.02


def rounded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same, exact in bfloat16."""
    return [tensor.detach().bfloat16().float().requires_grad_() for tensor in tensors]


def test_logits_are_not_rounded_under_bfloat16() -> None:
    """Of 16 to 32, bfloat16 has every eighth."""
    hidden, weight, targets = random_case(50, 64, 300, seed=0)
    hidden, weight = rounded(3 * hidden, weight)
    assert float((hidden @ weight.T).detach().amax(dim=1).median()) > 16
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropies = selected_logprobs(hidden, weight, targets, chunk_tokens=7)
    exact, exact_entropies = logprobs_of_targets(hidden, weight, targets, 1.0)
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropies.double(), exact_entropies, rtol=0, atol=1e-4)


def test_a_confident_tokens_gradient_is_its_own_under_bfloat16() -> None:
    """W[target] - p W is a small difference of large numbers where the target's probability is near 1."""
    hidden, weight, targets = random_case(50, 64, 300, seed=0)
    hidden, weight = rounded(0.2 * weight[targets], weight)
    exact, _ = logprobs_of_targets(hidden, weight, targets, 1.0)
    confident = (exact.exp() > 0.95) & (exact.exp() < 0.9999)
    assert confident.sum() > 10
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = selected_logprobs(hidden, weight, targets, chunk_tokens=7)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logprobs, exact)), strict=True):
        rows = confident if len(ours) == len(hidden) else targets[confident]
        assert float(((ours - theirs)[rows].norm(dim=1) / theirs[rows].norm(dim=1)).max()) < 0.02


def test_frozen_output_layer_gets_no_gradient() -> None:
    hidden, weight, targets = random_case(9, 4, 11, seed=0)
    expected = torch.autograd.grad(selected_logprobs(hidden, weight, targets, 0.7)[0].sum(), hidden)[0]
    held = weight.detach()
    selected_logprobs(hidden, held, targets, 0.7)[0].sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert held.grad is None


def test_no_targets() -> None:
    logprobs, entropies = selected_logprobs(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropies.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_logprobs_are_those_of_model_logits(temperature: float) -> None:
    policy = small_policy()
    rollouts, parameters = some_rollouts(policy), trained(policy)
    logprobs, entropies = policy.logprobs(rollouts, policy.hidden_states(rollouts), temperature)
    logits = policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits / temperature
    distributions = torch.log_softmax(logits[:, :-1], dim=-1)
    mask = rollouts.rationale_mask[:, 1:]
    expected = distributions.gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1) * mask
    torch.testing.assert_close(logprobs[:, 1:], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies[:, 1:], -(distributions.exp() * distributions).sum(dim=-1) * mask, rtol=1e-5, atol=1e-5)
    assert not logprobs[~rollouts.rationale_mask].any()
    assert not entropies[~rollouts.rationale_mask].any()
    ours, theirs = (flat(parameters, torch.autograd.grad(values.sum(), parameters)) for values in (logprobs, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
