"""The decode step at a GPU's pace, on the CPU: buffers in buckets, late looks at who has finished, nothing that a graph cannot replay."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts, join_prompts
from src.modules.rollouts import decoder, hf
from src.modules.rollouts.engine import Request, end_tokens
from src.modules.rollouts.hf import HFEngine, uniform_draws
from src.modules.types import Rollouts
from tests.builders import WINDOWED
from tests.vllm_builders import end_often, prompts_of, random_policy


def ending(kind: str = "qwen2") -> Policy:
    return end_often(random_policy(kind), 60)


@pytest.fixture
def gpu_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers with room to spare, and looks at who has finished that come late; of few columns, so that they grow."""
    pace = replace(decoder.PACES["cuda"], check=4, longer=lambda columns: max(6, 2 * columns))
    monkeypatch.setitem(decoder.PACES, "cpu", pace)


def written_one_by_one(policy: Policy, prompts: Prompts, n: int, limit: int, temperature: float, draws: Tensor) -> list[list[int]]:
    """The oracle: each rationale alone, a whole pass of the model for every token."""
    ends, head, rationales = set(end_tokens(policy).tolist()), policy.head, []
    for row, own in enumerate(draws):
        ids, rationale = prompts.ids[row // n], list[int]()
        while len(rationale) < limit and not ends & set(rationale):
            with torch.no_grad():
                logits = policy.model(ids.unsqueeze(0)).logits[0, -1, : len(head)]
            chances = torch.softmax(logits / (temperature or 1.0), dim=-1).cumsum(0)
            token = int(logits.argmax()) if temperature == 0 else int((chances <= own[len(rationale)] * chances[-1]).sum())
            rationale.append(token)
            ids = torch.cat([ids, torch.tensor([token])])
        rationales.append(rationale)
    return rationales


@pytest.mark.parametrize(
    ("kind", "n", "temperature"), [("qwen2", 3, 1.0), ("qwen3", 1, 0.0), ("llama", 5, 0.8), *((kind, 3, 1.0) for kind in WINDOWED)]
)
def test_ids_are_those_of_whole_passes(gpu_pace: None, kind: str, n: int, temperature: float) -> None:
    policy = ending(kind)
    prompts = prompts_of(policy)
    rollouts = HFEngine(14).generate(policy, prompts, n, temperature, seed=4)
    expected = written_one_by_one(policy, prompts, n, 14, temperature, uniform_draws(4, len(prompts), n, 14))
    assert [ids.tolist() for ids in rollouts.rationales()] == expected
    assert len({len(ids) for ids in expected}) > 1  # rows left


@pytest.mark.parametrize(("pooling", "layer", "n"), [("mean", -1, 3), ("max", -2, 4), ("eos", -1, 1)])
def test_pace_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch, pooling: str, layer: int, n: int) -> None:
    policy = ending()
    policy.pooling, policy.layer = pooling, layer  # type: ignore[assignment]
    results = []
    for pace in (decoder.PACES["cpu"], replace(decoder.PACES["cuda"], check=2, longer=lambda columns: max(3, 2 * columns))):
        monkeypatch.setitem(decoder.PACES, "cpu", pace)
        results.append(HFEngine(20, batch_tokens=900).generate(policy, prompts_of(policy), n, seed=2, prefixes=True))
    same(*results, atol=1e-5)


def same(first: Rollouts, second: Rollouts, atol: float) -> None:
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.finished, second.finished)
    for name in ("logprobs", "embeddings", "prefix_embeddings", "prompt_embeddings"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=atol, rtol=atol)


class NothingRead(TorchDispatchMode):
    """Fails where an operation gives Python a number, or has a shape that depends on one: neither can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "temperature"), [("qwen2", 0.0), ("qwen2", 1.0), ("gemma3", 1.0)])
def test_step_reads_nothing_from_the_device(gpu_pace: None, kind: str, temperature: float) -> None:
    policy, steps = ending(kind), list[object]()

    def watched(self: decoder.Decoder) -> None:
        steps.append(self.key)
        with NothingRead():
            step(self)

    step = decoder.Decoder.step
    with patch.object(decoder.Decoder, "step", watched):
        HFEngine(20).generate(policy, prompts_of(policy), n=3, temperature=temperature, prefixes=True)
    assert len(steps) > 10


def test_one_key_has_one_place(gpu_pace: None) -> None:
    """What a graph of a key would read and write lies where it lay for that key before, in a later batch too."""
    policy, engine = ending(), HFEngine(20)
    places: dict[object, set[tuple[int, ...]]] = {}
    step = decoder.Decoder.step

    def watched(self: decoder.Decoder) -> None:
        c, names = self.cache, ("rows", "done", "hidden", "ids", "logprobs", "pooled", "prefixes", "draws", "ends")
        pairs = itertools.chain(*c.prompt, *c.own)
        tensors = [*pairs, *(getattr(self, name) for name in names), c.bias, c.column, c.groups, c.places, c.row_of_slot, c.prompt_lengths]
        places.setdefault(self.key, set()).add(tuple(t.data_ptr() for t in tensors if t.numel()))
        step(self)

    with patch.object(decoder.Decoder, "step", watched), kept(engine):
        longest = prompts_of(policy)
        for seed in range(2):
            for rows in (range(8), range(3), range(2, 8), range(8)):
                engine.generate(policy, longest.select(torch.tensor([i % len(longest) for i in rows])), n=3, seed=seed, prefixes=True)
    assert len(places) > 6
    assert all(len(found) == 1 for found in places.values())


def test_graphs_of_moved_buffers_are_dropped(gpu_pace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches may ask for more memory, and a graph captured before would read and write what is no longer theirs."""
    replayed: list[bool] = []

    class Remembered:
        """In place of Graphs: remembers where tensors lay at the second step of a key, when a GPU would capture it."""

        def __init__(self, device: torch.device) -> None:
            self.seen: dict[object, list[list[int]]] = {}

        def run(self, key: object, step: Any) -> None:
            one = step.__self__
            tensors = [*itertools.chain(*one.cache.prompt, *one.cache.own), *vars(one).values(), *vars(one.cache).values()]
            seen = self.seen.setdefault(key, [])
            seen.append([t.data_ptr() for t in tensors if isinstance(t, Tensor) and t is not one.prompt_pooled and t.numel()])
            if len(seen) > 2:
                replayed.append(seen[-1] == seen[1])
            step()

    monkeypatch.setattr(hf, "Graphs", Remembered)
    monkeypatch.setattr(HFEngine, "_captures", lambda self, policy: True)
    policy, engine, generator = ending(), HFEngine(8, batch_tokens=160), torch.Generator().manual_seed(1)
    short, long = random_prompts(generator, 10, 11, 3), random_prompts(generator, 100, 101, 1)
    for prompts in (short, short, join_prompts([short, long]), short):  # the long one is a batch of its own, before the others
        engine.generate_all(policy, [Request(prompts, 2, 1.0, 0), Request(short, 1, 0.7, 0)])
    assert all(replayed)
    assert len(replayed) > 10


@contextmanager
def kept(engine: HFEngine) -> Iterator[None]:
    """Keeps an engine's buffers from call to call on the CPU, as on a GPU."""
    with patch("src.modules.rollouts.hf.Buffers", lambda: engine._buffers):
        yield


def test_memory_is_flat(gpu_pace: None) -> None:
    policy, engine, generator = ending(), HFEngine(6), torch.Generator().manual_seed(0)
    sizes = []
    with kept(engine):
        for batch in range(50):
            engine.generate(policy, random_prompts(generator, 3, 90), n=2, seed=batch)
            sizes.append(engine._buffers.bytes())
    assert len(set(sizes[20:])) == 1


# ---- precision


def with_key_biases(size: float) -> Policy:
    """A policy whose keys have biases as large as Qwen2's, which move all scores of a query alike but for its position."""
    policy = random_policy("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    generator = torch.Generator().manual_seed(0)
    for layer in policy.model.base_model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.data = torch.zeros_like(bias)
        bias.data.view(2, -1)[:, -1] = size  # of the lowest frequency, which rotates little
        layer.self_attn.q_proj.bias.data = torch.randn(layer.self_attn.q_proj.bias.shape, generator=generator)
    return policy


def test_large_key_biases_do_not_blur_scores() -> None:
    """Rounded to bfloat16, scores of 50 are off by up to 0.25: log-probs here by 0.053 on average, and by 0.005 with float32 scores."""
    policy = with_key_biases(128.0)
    prompts = prompts_of(policy)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = HFEngine(12).generate(policy, prompts, n=2, seed=1)
        with torch.no_grad():
            trainer, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts, torch.arange(len(rollouts)) // 2))
    # the trainer's pass has the same keys, values and weights in bfloat16, and its attention adds up in float32
    assert float((rollouts.logprobs - trainer)[rollouts.rationale_mask].abs().mean()) < 0.02


def test_bfloat16_policy_writes() -> None:
    policy = ending()
    exact = HFEngine(16).generate(policy, prompts_of(policy), n=2, seed=3)
    policy.to(torch.bfloat16)
    rollouts = HFEngine(16).generate(policy, prompts_of(policy), n=2, seed=3, prefixes=True)
    assert rollouts.logprobs.dtype == rollouts.embeddings.dtype == torch.float32
    with torch.no_grad():
        own, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts))
        embeddings = policy.embed(rollouts)
    assert float((rollouts.logprobs - own)[rollouts.rationale_mask].abs().mean()) < 0.05
    assert torch.cosine_similarity(rollouts.embeddings, embeddings).min() > 0.999
    assert torch.cosine_similarity(rollouts.prompt_embeddings, exact.prompt_embeddings).min() > 0.99


def test_cast_weights_are_what_autocast_makes_of_them() -> None:
    policy = ending()
    names = {name: id(weight) for name, weight in policy.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (HFEngine(12, cast_weights=cast).generate(policy, prompts_of(policy), n=3, seed=3) for cast in (True, False))
        for weight in policy.parameters():
            weight.data.mul_(1.5)  # no copy outlives its call
        changed = [HFEngine(12, cast_weights=cast).generate(policy, prompts_of(policy), n=3, seed=3).logprobs for cast in (True, False)]
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.embeddings, other.embeddings)
    assert torch.equal(*changed)
    assert {name: id(weight) for name, weight in policy.named_parameters()} == names
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_rows_without_a_token_are_never_drawn() -> None:
    policy = random_policy("untied", seed=0)
    tokens = len(policy.tokenizer)
    wide = random_policy("untied")
    wide.model.resize_token_embeddings(tokens + 60, mean_resizing=False)
    with torch.no_grad():
        for theirs, ours in zip(wide.model.parameters(), policy.model.parameters(), strict=True):
            theirs[: len(ours)] = ours
        wide.model.lm_head.weight[tokens:] = 50 * wide.model.lm_head.weight[:60]  # likelier than any token
    ours, theirs = (HFEngine(12).generate(p, prompts_of(p), n=4, seed=2) for p in (policy, wide))
    assert int(theirs.input_ids.max()) < tokens
    assert torch.equal(ours.input_ids, theirs.input_ids)
    with torch.no_grad():
        logprobs, _ = wide.logprobs(theirs, wide.hidden_states(theirs))
    torch.testing.assert_close(theirs.logprobs, logprobs, atol=1e-4, rtol=0)  # one distribution in sampling and training


# ---- on a GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def gpu_policy(kind: str = "qwen2") -> Policy:
    return ending(kind).to("cuda")


class TestGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (4, 1.0)])
    @pytest.mark.parametrize("kind", ["qwen2", "untied", "llama", "gemma3"])
    def test_graphs_change_rounding_alone(self, kind: str, n: int, temperature: float) -> None:
        policy, engine = gpu_policy(kind), HFEngine(40)
        plain = HFEngine(40, cuda_graphs=False).generate(policy, prompts_of(policy), n, temperature, seed=3, prefixes=True)
        for _ in range(2):  # captured, then replayed
            same(engine.generate(policy, prompts_of(policy), n, temperature, seed=3, prefixes=True), plain, atol=1e-4)
        cpu = HFEngine(40).generate(ending(kind), prompts_of(policy), n, temperature, seed=3, prefixes=True)
        same(plain.to("cpu"), cpu, atol=1e-3)

    def test_bfloat16_is_near_float32(self) -> None:
        policy = gpu_policy()
        with torch.autocast("cuda", torch.bfloat16):
            rollouts = HFEngine(40).generate(policy, prompts_of(policy), n=4, seed=3)
            uncast = HFEngine(40, cast_weights=False).generate(policy, prompts_of(policy), n=4, seed=3)
        assert torch.equal(rollouts.input_ids, uncast.input_ids)
        torch.testing.assert_close(rollouts.logprobs, uncast.logprobs, atol=1e-3, rtol=0)
        with torch.no_grad():
            exact, _ = policy.logprobs(rollouts, policy.hidden_states(rollouts))
            embeddings = policy.embed(rollouts)
        assert float((rollouts.logprobs - exact)[rollouts.rationale_mask].abs().mean()) < 0.05
        assert torch.cosine_similarity(rollouts.embeddings, embeddings).min() > 0.99

    def test_weights_are_read_anew(self) -> None:
        policy, engine = gpu_policy(), HFEngine(40)
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(3):
                rollouts = engine.generate(policy, prompts_of(policy), n=2, seed=3)
                plain = HFEngine(40, cuda_graphs=False).generate(policy, prompts_of(policy), n=2, seed=3)
                assert torch.equal(rollouts.input_ids, plain.input_ids)
                with torch.no_grad():
                    for weight in policy.parameters():
                        weight.mul_(1.1)

    def test_like_batches_share_a_graph(self) -> None:
        policy, engine, generator = gpu_policy(), HFEngine(16), torch.Generator().manual_seed(0)  # too short for a look at who has finished
        for batch in range(6):
            engine.generate(policy, random_prompts(generator, 81, 97), n=2, seed=batch)  # one bucket
            assert engine._graphs is not None
            assert engine._graphs.captures == 1

    def test_memory_is_flat(self) -> None:
        policy, engine, generator, held = gpu_policy(), HFEngine(40), torch.Generator().manual_seed(0), []
        for batch in range(50):
            engine.generate(policy, random_prompts(generator, 3, 90), n=2, seed=batch)
            held.append(torch.cuda.memory_allocated())
        assert max(held[20:]) <= held[20] + 2**24


def random_prompts(generator: torch.Generator, shortest: int, longest: int, count: int = 6) -> Prompts:
    """Prompts of random tokens, of `shortest` to `longest` - 1."""
    lengths = torch.randint(shortest, longest, (count,), generator=generator)
    ids = tuple(torch.randint(5, 60, (int(length),), generator=generator) for length in lengths)
    return Prompts(ids, torch.ones(count, dtype=torch.long), lengths - 1)


@pytest.mark.parametrize("count", [*range(1, 70), 1023, 1025])
def test_buckets_hold_what_they_are_for(count: int) -> None:
    bucket = decoder.rounded_up(count)
    assert count <= bucket <= 1.25 * count
    assert decoder.rounded_up(bucket) == bucket
