from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from src.modules.encoder.encoder import WRITTEN_AT_A_TIME, RationaleEncoder, strings_of
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts

SETTINGS = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=6)
TEXTS = ["a graph", "Draw random samples from a normal distribution.", "the table", "Split the text into words and count them."]


class Recording(HFEngine):
    """The engine, with a record of its calls."""

    def __init__(self) -> None:
        super().__init__(SETTINGS.max_new_tokens)
        self.prompts: list[Prompts] = []
        self.modes: list[tuple[bool, bool]] = []

    def generate(self, policy: Policy, prompts: Prompts, *args: Any, **kwargs: Any) -> Rollouts:
        self.prompts.append(prompts)
        self.modes.append((policy.model.training, torch.is_grad_enabled()))
        return super().generate(policy, prompts, *args, **kwargs)


def encoder(policy: Policy, **options: object) -> RationaleEncoder:
    return RationaleEncoder(policy, SETTINGS, HFEngine(SETTINGS.max_new_tokens), **options)  # type: ignore[arg-type]


@torch.no_grad()
def one_by_one(policy: Policy, texts: Sequence[str], rationale: bool) -> np.ndarray:
    """The definition, one text at a time: render, write greedily, mean of the states from the text on."""
    policy.eval()
    render, rows = PromptRenderer(policy.tokenizer, SETTINGS.instruction, SETTINGS.max_prompt_tokens), []
    for text in texts:
        prompts = render([text])
        ids = prompts.ids[0].unsqueeze(0)
        if rationale:
            ids = HFEngine(SETTINGS.max_new_tokens).generate(policy, prompts, n=1, temperature=0.0, seed=0).input_ids
        states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        rows.append(states[int(prompts.text_starts[0]) :].mean(dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("rationale", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 100, 2**15])
@pytest.mark.parametrize("kind", ["live", "frozen"])
def test_budgets_give_what_single_texts_give(tiny_policy: Policy, rationale: bool, batch_tokens: int, kind: Any) -> None:
    policy = Policy(tiny_policy.model, tiny_policy.tokenizer, kind)
    embeddings = encoder(policy, rationale=rationale, batch_tokens=batch_tokens).encode(TEXTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, one_by_one(tiny_policy, TEXTS, rationale), atol=2e-6)


def test_repeated_text_is_embedded_once(tiny_policy: Policy) -> None:
    engine = Recording()
    repeated = [TEXTS[1], TEXTS[0], TEXTS[1], TEXTS[1]]
    embeddings = RationaleEncoder(tiny_policy, SETTINGS, engine, temperature=1.0).encode(repeated)
    assert sum(len(prompts) for prompts in engine.prompts) == 2
    np.testing.assert_array_equal(embeddings[0], embeddings[3])
    assert not np.array_equal(embeddings[0], embeddings[1])


def test_engine_gets_texts_of_like_lengths(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recording()
    monkeypatch.setitem(WRITTEN_AT_A_TIME, "cpu", 3)
    RationaleEncoder(tiny_policy, SETTINGS, engine).encode(TEXTS)
    assert [len(prompts) for prompts in engine.prompts] == [3, 1]
    lengths = torch.cat([prompts.lengths for prompts in engine.prompts]).tolist()
    assert lengths == sorted(lengths, reverse=True)


def test_rationales_of_one_side(tiny_policy: Policy) -> None:
    with_rationales, without = encoder(tiny_policy).encode(TEXTS), encoder(tiny_policy, rationale=False).encode(TEXTS)
    assert np.abs(with_rationales - without).max() > 1e-3
    for rationale in ("query", "document"):
        own = encoder(tiny_policy, rationale=rationale)
        for prompt_type in ("query", "document", None):  # texts of no side are embedded alike, and in the cheaper way
            expected = with_rationales if prompt_type == rationale else without
            np.testing.assert_array_equal(own.encode(TEXTS, prompt_type), expected)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_precision_is_the_encoders_own(tiny_policy: Policy, bf16: bool, around: bool) -> None:
    seen, single = [], encoder(tiny_policy, rationale=False)
    tiny_policy.model.base_model.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        vectors = encoder(tiny_policy, rationale=False, bf16=bf16).encode(TEXTS)
    assert set(seen) == {bf16}
    assert not single.bf16  # None: on a GPU alone
    expected = single.encode(TEXTS)
    assert np.abs(vectors - expected).max() <= (0.05 * np.abs(expected).max() if bf16 else 1e-6)


def test_sampling_follows_the_seed(tiny_policy: Policy) -> None:
    first, again, other = (encoder(tiny_policy, temperature=1.0, seed=seed).explain(TEXTS)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_explain_shows_the_rationale(tiny_policy: Policy) -> None:
    embeddings, rationales = encoder(tiny_policy).explain(TEXTS)
    np.testing.assert_array_equal(embeddings, encoder(tiny_policy).encode(TEXTS))
    prompts = PromptRenderer(tiny_policy.tokenizer, SETTINGS.instruction, SETTINGS.max_prompt_tokens)(TEXTS[:1])
    rollout = HFEngine(SETTINGS.max_new_tokens).generate(tiny_policy, prompts, n=1, temperature=0.0, seed=0)
    ids = rollout.rationales()[0][: -1 if rollout.finished[0] else None]
    assert rationales[0] == tiny_policy.tokenizer.decode(ids)
    assert encoder(tiny_policy, rationale=False).explain(TEXTS)[1] == [""] * len(TEXTS)


def test_embeddings_of_the_engine_are_used(tiny_policy: Policy) -> None:
    class Pooling(HFEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
            rollouts = super().generate(*args, **kwargs)
            return replace(rollouts, embeddings=torch.full((len(rollouts), 32), 7.0))

    assert (RationaleEncoder(tiny_policy, SETTINGS, Pooling(6)).encode(TEXTS) == 7.0).all()


def test_policy_modes_are_restored(tiny_policy: Policy) -> None:
    engine = Recording()
    tiny_policy.train()
    tiny_policy.model.base_model.layers[0].eval()  # a part that is held in eval mode stays there
    before = [part.training for part in tiny_policy.modules()]
    RationaleEncoder(tiny_policy, SETTINGS, engine).encode(TEXTS)
    assert [part.training for part in tiny_policy.modules()] == before
    assert engine.modes == [(False, False)]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("rationale", [False, True])
def test_empty_and_overlong_texts_embed(tiny_policy: Policy, rationale: bool) -> None:
    embeddings = encoder(tiny_policy, rationale=rationale).encode(["", "word " * 500])
    assert np.isfinite(embeddings).all()
    assert encoder(tiny_policy, rationale=rationale).encode([]).shape == (0, 32)


def test_non_finite_embedding_names_its_text(tiny_policy: Policy) -> None:
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"2 of 2 embeddings are not finite, the first that of the text 'a graph'"):
        encoder(tiny_policy, rationale=False).encode(["a graph", "the table"])


def test_arguments_of_a_call_override_the_encoders(tiny_policy: Policy) -> None:
    writing, plain = encoder(tiny_policy), encoder(tiny_policy, rationale=False)
    np.testing.assert_array_equal(writing.encode(TEXTS, rationale=False), plain.encode(TEXTS))
    np.testing.assert_array_equal(plain.encode(TEXTS, rationale=True), writing.encode(TEXTS))
    assert plain.explain(TEXTS, rationale=True)[1] == writing.explain(TEXTS)[1]
    engine = Recording()
    RationaleEncoder(tiny_policy, SETTINGS, engine).encode(TEXTS, rationale=False, batch_tokens=1)
    assert engine.prompts == []


def test_query_instruction(tiny_policy: Policy) -> None:
    plain, asking = encoder(tiny_policy), replace(SETTINGS, query_instruction="What would answer this?")
    two = RationaleEncoder(tiny_policy, asking, HFEngine(6))
    queries = RationaleEncoder(tiny_policy, replace(SETTINGS, instruction="What would answer this?"), HFEngine(6))
    np.testing.assert_array_equal(two.encode(TEXTS, prompt_type="query"), queries.encode(TEXTS))
    np.testing.assert_array_equal(two.encode(TEXTS, prompt_type="document"), plain.encode(TEXTS))
    np.testing.assert_array_equal(two.encode(TEXTS), plain.encode(TEXTS))
    np.testing.assert_array_equal(plain.encode(TEXTS, prompt_type="query"), plain.encode(TEXTS))


def test_from_pretrained_reads_an_exported_folder(tiny_policy: Policy, tmp_path: Path) -> None:
    folder = export(tiny_policy, SETTINGS, tmp_path / "export")
    loaded = RationaleEncoder.from_pretrained(folder)
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder(tiny_policy).encode(TEXTS), atol=1e-6)
    bare = export(tiny_policy, replace(SETTINGS, rationale=False), tmp_path / "bare")  # of a baseline, trained without rationales
    without = encoder(tiny_policy, rationale=False).encode(TEXTS)
    np.testing.assert_allclose(RationaleEncoder.from_pretrained(bare).encode(TEXTS), without, atol=1e-6)
    short = RationaleEncoder.from_pretrained(str(folder), max_new_tokens=2)
    assert short.settings.max_new_tokens == short.engine.max_new_tokens == 2
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: name an exported folder"):
        RationaleEncoder.from_pretrained(tmp_path / "nowhere")


def test_progress_bar(tiny_policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    encoder(tiny_policy, rationale=False).encode(TEXTS)
    assert capsys.readouterr().err == ""
    encoder(tiny_policy, rationale=False).encode(TEXTS, show_progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"texts": "a graph"}, "texts is one string"),
        ({}, {"texts": TEXTS, "prompt_type": "passage"}, "prompt_type='passage'"),
        ({}, {"texts": TEXTS, "batch_tokens": 0}, "batch_tokens=0"),
        ({"temperature": -1.0}, {"texts": TEXTS}, "temperature=-1.0"),
        ({"batch_tokens": 0}, {"texts": TEXTS}, "batch_tokens=0"),
        ({"rationale": "queries"}, {"texts": TEXTS}, "rationale='queries': it is both, query, document or none"),
    ],
)
def test_bad_arguments(tiny_policy: Policy, options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        encoder(tiny_policy, **options).encode(**call)


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, np.array, pd.Series, lambda texts: pd.Series(texts, index=[7, 3])],
    ids=["list", "tuple", "iterator", "array", "series", "other index"],
)
def test_any_iterable_of_strings_is_embedded(tiny_policy: Policy, form: Any) -> None:
    texts, own = ["a text", "another"], encoder(tiny_policy)
    np.testing.assert_array_equal(own.encode(form(texts), rationale=False), own.encode(texts, rationale=False))


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (float("nan"), "float"), (3, "int"), (b"x", "bytes"), (["x"], "list")])
def test_what_is_no_string_is_named_with_its_place(tiny_policy: Policy, value: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"texts\[1\].*{kind}"):
        encoder(tiny_policy).encode(["a text", value])


@pytest.mark.parametrize("texts", [{"a": 1}, {"a", "b"}, b"ab", None, 3], ids=["dict", "set", "bytes", "none", "int"])
def test_texts_without_an_order_are_refused(texts: Any) -> None:
    with pytest.raises(TypeError, match=f"type {type(texts).__name__}: give strings in an order"):
        strings_of(texts)


def test_rationale_of_a_call_has_the_values_of_the_setting(tiny_policy: Policy) -> None:
    encoder = RationaleEncoder(tiny_policy, EncoderSettings("Name the terms.", 64, 3), HFEngine(3))
    without = encoder.encode(["a text"], rationale=False)
    np.testing.assert_array_equal(encoder.encode(["a text"], rationale="none"), without)
    np.testing.assert_array_equal(encoder.encode(["a text"], prompt_type="document", rationale="query"), without)
    assert not np.allclose(encoder.encode(["a text"], rationale="both"), without)
