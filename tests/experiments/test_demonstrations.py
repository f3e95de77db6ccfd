import itertools
import math
import random

import pytest

from experiments.tiny_policy.demonstrations import (
    DemonstrationDataModule,
    DemonstrationStream,
    draw_terms,
    inverse_document_frequency,
)
from src.datamodules.docstrings import Docstring

NOUNS = ["matrix", "socket", "lexer", "tensor", "cursor", "kernel", "buffer", "signal", "widget", "branch", "ledger", "planet"]


def corpus() -> list[Docstring]:
    """5 docstrings in each of 6 modules, with two rare words each among words that all share."""
    docs = []
    for m, i in itertools.product(range(6), range(5)):
        one, other = f"{NOUNS[m]}_{i}", f"Of{NOUNS[-1 - m]}{i}"
        body = f"The value {one} and the {other} of it " * 4
        docs.append(Docstring(f"pack.mod{m}:f{i}", "pack", f"pack.mod{m}", f"Return the {one} here", body))
    return docs


def stream(seed: int = 0, done: int = 0) -> DemonstrationStream:
    settings = {"modules_per_batch": 2, "docstrings_per_module": 3, "terms": 3, "max_text_chars": 60}
    return DemonstrationStream(corpus(), **settings, seed=seed, done=lambda: done)


def test_inverse_document_frequency_by_hand():
    docs = [Docstring(text, "p", "m", *text.split(", ")) for text in ("Red fox, fox runs", "Red hen, hen sits")]
    assert inverse_document_frequency(docs) == {"red": 0.0, **dict.fromkeys(("fox", "runs", "hen", "sits"), math.log(2))}


def test_terms_keep_order_and_spelling():
    text = "The Kernel of a tensor: kernel, Lexer, cursor"
    idf = {"kernel": 5.0, "tensor": 4.0, "lexer": 3.0, "cursor": 3.0, "the": 0.1}
    for seed in range(20):
        terms = draw_terms(text, idf, 3, random.Random(seed))
        assert len(terms) == 3
        assert terms == [word for word in ["Kernel", "tensor", "Lexer", "cursor"] if word in terms]
    assert draw_terms("the of and", {"the": 0.1}, 4, random.Random(0)) == []


def test_rare_terms_are_drawn_more_often():
    idf = {"rare": 8.0, "middling": 5.0, "common": 2.5}
    draws = [draw_terms("rare middling common", idf, 1, random.Random(seed))[0] for seed in range(400)]
    counts = [draws.count(word) for word in ("rare", "middling", "common")]
    assert counts == sorted(counts, reverse=True)
    weights = [math.exp(0.7 * value) for value in idf.values()]
    assert counts[0] / 400 == pytest.approx(weights[0] / sum(weights), abs=0.06)


def test_demonstrations_are_of_the_shown_text():
    by_summary = {doc.summary: doc for doc in corpus()}
    for demonstration in next(iter(stream())):
        doc = by_summary[demonstration.query]
        assert doc.body.startswith(demonstration.document)
        assert len(demonstration.document) <= 60
        assert demonstration.document_rationale.endswith(f"</think> {doc.summary}")
        terms = demonstration.document_rationale.removeprefix("<think> ").split("</think>")[0].split(", ")
        assert 1 <= len(terms) <= 3
        assert all(term in demonstration.document for term in terms)


def test_batches_hold_modules():
    modules = {doc.summary: doc.module for doc in corpus()}
    for batch in itertools.islice(stream(), 20):
        assert len(batch) == 2 * 3
        for group in (batch[:3], batch[3:]):
            assert len({modules[d.query] for d in group}) <= 2


def test_epoch_holds_each_docstring_once():
    batches = list(itertools.islice(stream(), 15))
    epochs = [batches[:5], batches[5:10], batches[10:]]
    assert all(len({d.query for batch in epoch for d in batch}) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_seed_and_place_decide_the_stream():
    first = list(itertools.islice(stream(3), 6))
    assert list(itertools.islice(stream(3), 6)) == first
    assert list(itertools.islice(stream(4), 6)) != first
    assert list(itertools.islice(stream(3, done=4), 2)) == first[4:]  # a resumed run


def test_validation_is_fixed_and_of_other_packages(tmp_path):
    settings = {"modules_per_batch": 4, "docstrings_per_module": 2, "val_batches": 3}
    data = DemonstrationDataModule(["rich"], ["jinja2"], str(tmp_path), **settings)
    training = {d.query for batch in itertools.islice(data.train_dataloader(), 40) for d in batch}
    validation = list(data.val_dataloader())
    assert [len(batch) for batch in validation] == [8, 8, 8]
    assert not training & {d.query for batch in validation for d in batch}
    again = DemonstrationDataModule(["rich"], ["jinja2"], str(tmp_path), **settings, seed=5)
    assert list(again.val_dataloader()) == validation


def test_too_few_docstrings_for_a_batch():
    with pytest.raises(ValueError, match="do not fill one batch"):
        DemonstrationStream(corpus()[:5], modules_per_batch=3, docstrings_per_module=2, terms=2, max_text_chars=100, seed=0)
