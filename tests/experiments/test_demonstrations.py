import itertools
import math
import random
from pathlib import Path

import pytest

from experiments.tiny_policy.demonstrations import (
    DemonstrationDataModule,
    DemonstrationStream,
    draw_terms,
    inverse_document_frequency,
    write_rationale,
)
from src.datamodules.docstrings import Docstring

NOUNS = ["matrix", "socket", "lexer", "tensor", "cursor", "kernel", "buffer", "signal", "widget", "branch", "ledger", "planet"]


def corpus(modules: int = 6, per_module: int = 5) -> list[Docstring]:
    """Docstrings with two rare words each among words that all share."""
    docs = []
    for m, i in itertools.product(range(modules), range(per_module)):
        rare = [f"{NOUNS[m]}_{i}", f"Of{NOUNS[-1 - m]}{i}"]
        docs.append(
            Docstring(
                f"pack.mod{m}:f{i}",
                "pack",
                f"pack.mod{m}",
                f"Return the {rare[0]} here",
                f"The value {rare[0]} and the {rare[1]} of it " * 4,
            )
        )
    return docs


def stream(seed: int = 0, **settings: int) -> DemonstrationStream:
    return DemonstrationStream(
        corpus(), **({"modules_per_batch": 2, "docstrings_per_module": 3, "terms": 3, "max_text_chars": 60} | settings), seed=seed
    )


def test_inverse_document_frequency_by_hand() -> None:
    docs = [
        Docstring(str(i), "p", "m", summary, body) for i, (summary, body) in enumerate([("Red fox", "fox runs"), ("Red hen", "hen sits")])
    ]
    assert inverse_document_frequency(docs) == {
        "red": 0.0,
        "fox": math.log(2),
        "runs": math.log(2),
        "hen": math.log(2),
        "sits": math.log(2),
    }


def test_terms_are_words_of_the_text_in_its_order_and_spelling() -> None:
    text = "The Kernel of a tensor: kernel, Lexer, cursor"
    idf = {"kernel": 5.0, "tensor": 4.0, "lexer": 3.0, "cursor": 3.0, "the": 0.1}
    for seed in range(20):
        terms = draw_terms(text, idf, 3, random.Random(seed))
        assert len(terms) == 3
        assert terms == [word for word in ["Kernel", "tensor", "Lexer", "cursor"] if word in terms]


def test_terms_vary_with_the_draw_and_rare_words_are_drawn_more() -> None:
    idf = {"rare": 8.0, "middling": 5.0, "common": 2.5}
    draws = [draw_terms("rare middling common", idf, 1, random.Random(seed))[0] for seed in range(400)]
    counts = [draws.count(word) for word in ("rare", "middling", "common")]
    assert counts == sorted(counts, reverse=True)
    weights = [math.exp(0.7 * value) for value in idf.values()]
    assert counts[0] / 400 == pytest.approx(weights[0] / sum(weights), abs=0.06)
    assert draws == [draw_terms("rare middling common", idf, 1, random.Random(seed))[0] for seed in range(400)]


def test_a_text_without_known_words_has_no_terms() -> None:
    assert draw_terms("the of and", {"the": 0.1}, 4, random.Random(0)) == []


def test_the_form_of_a_rationale() -> None:
    assert write_rationale(["kernel", "tensor"], "Sum it up.") == "<think> kernel, tensor</think> Sum it up."


def test_demonstrations_speak_of_their_own_docstring_as_far_as_it_is_shown() -> None:
    by_summary = {doc.summary: doc for doc in corpus()}
    for demonstration in next(iter(stream())):
        doc = by_summary[demonstration.query]
        assert doc.body.startswith(demonstration.document)
        assert len(demonstration.document) <= 60
        assert demonstration.document_rationale.endswith(f"</think> {doc.summary}")
        terms = demonstration.document_rationale.removeprefix("<think> ").split("</think>")[0].split(", ")
        assert 1 <= len(terms) <= 3
        assert all(term in demonstration.document for term in terms)


def test_a_batch_is_groups_of_neighbours() -> None:
    modules = {doc.summary: doc.module for doc in corpus()}
    for batch in itertools.islice(stream(), 20):
        assert len(batch) == 2 * 3
        for group in (batch[:3], batch[3:]):
            assert len({modules[d.query] for d in group}) <= 2


def test_no_docstring_comes_twice_in_an_epoch_and_the_stream_does_not_end() -> None:
    batches_an_epoch = len(corpus()) // 6
    batches = list(itertools.islice(stream(), 3 * batches_an_epoch))
    for epoch in range(3):
        queries = [d.query for batch in batches[epoch * batches_an_epoch : (epoch + 1) * batches_an_epoch] for d in batch]
        assert len(set(queries)) == len(queries) == 30
    assert batches[:batches_an_epoch] != batches[batches_an_epoch : 2 * batches_an_epoch]


def test_the_seed_decides_everything() -> None:
    def first(seed: int) -> list[object]:
        return list(itertools.islice(stream(seed), 4))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_the_datamodule_validates_on_other_packages_and_always_the_same(tmp_path: Path) -> None:
    settings = {"modules_per_batch": 4, "docstrings_per_module": 2, "val_batches": 3}
    data = DemonstrationDataModule(["rich"], ["jinja2"], str(tmp_path), **settings)  # type: ignore[arg-type]
    training = {d.query for batch in itertools.islice(data.train_dataloader(), 40) for d in batch}
    validation = list(data.val_dataloader())
    assert [len(batch) for batch in validation] == [8, 8, 8]
    assert not training & {d.query for batch in validation for d in batch}
    again = DemonstrationDataModule(["rich"], ["jinja2"], str(tmp_path), **settings, seed=5)  # type: ignore[arg-type]
    assert list(again.val_dataloader()) == validation


def test_too_few_docstrings_for_a_batch_are_refused_and_do_not_hang() -> None:
    docs = [Docstring(f"m:{i}", "m", "m", "a summary of some words", "a body of some words") for i in range(5)]
    with pytest.raises(ValueError, match="do not fill one batch"):
        DemonstrationStream(docs, modules_per_batch=3, docstrings_per_module=2, terms=2, max_text_chars=100, seed=0)


def test_a_resumed_run_goes_on_at_its_place_with_the_same_terms() -> None:
    whole = list(itertools.islice(stream(), 6))
    later = DemonstrationStream(corpus(), modules_per_batch=2, docstrings_per_module=3, terms=3, max_text_chars=60, seed=0, done=lambda: 4)
    assert list(itertools.islice(later, 2)) == whole[4:]
