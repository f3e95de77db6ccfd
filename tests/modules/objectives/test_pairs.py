from hypothesis import given
from hypothesis import strategies as st

from src.modules.objectives.pairs import dropout_twice, supervised
from src.records import Triplet

few = st.sampled_from([*"abcdefg", " a", "b\n"])
triplets = st.builds(Triplet, st.just("id"), few, few, st.lists(few, max_size=3).map(tuple))


def shares(a: Triplet, b: Triplet) -> bool:
    return bool({a.query.strip(), a.positive.strip()} & {b.query.strip(), b.positive.strip()})


@given(st.lists(triplets, min_size=1, max_size=8))
def test_supervised_pairs_leave_out_texts_that_belong_to_the_query(batch: list[Triplet]) -> None:
    pairs = supervised(batch)
    assert pairs.queries == tuple(t.query.strip() for t in batch)
    texts = {t.positive.strip() for t in batch} | {n.strip() for t in batch for n in t.negatives}
    assert set(pairs.documents) == texts
    assert len(pairs.documents) == len(texts)
    for i, triplet in enumerate(batch):
        assert pairs.documents[pairs.own[i]] == triplet.positive.strip()
        belong = {t.positive.strip() for t in batch if shares(t, triplet)} | ({triplet.query.strip()} & texts)
        assert {pairs.documents[j] for j in pairs.left_out[i].nonzero().flatten()} == belong - {triplet.positive.strip()}
    assert pairs.false_negatives == sum(shares(batch[i], batch[j]) for j in range(len(batch)) for i in range(j))


def test_paraphrases_in_both_directions_and_a_negative_that_is_known_to_be_relevant() -> None:
    batch = [
        Triplet("1", "a", "b", ("x", "a ")),
        Triplet("2", "b", "a", ("y",)),
        Triplet("3", "q", "p", ("r",)),
        Triplet("4", "q", "r", ("z",)),
    ]
    pairs = supervised(batch)
    assert pairs.documents == ("b", "a", "p", "r", "x", "y", "z")
    assert [[pairs.documents[j] for j in row.nonzero().flatten()] for row in pairs.left_out] == [["a"], ["b"], ["r"], ["p"]]
    assert pairs.false_negatives == 2


@given(st.lists(triplets, min_size=1, max_size=8))
def test_dropout_pairs_texts_with_themselves(batch: list[Triplet]) -> None:
    pairs = dropout_twice(batch)
    positives = [t.positive.strip() for t in batch]
    assert pairs.queries == pairs.documents
    assert sorted(pairs.documents) == sorted(set(positives))
    assert pairs.own.tolist() == list(range(len(pairs.documents)))
    assert not pairs.left_out.any()
    assert pairs.texts == [*pairs.queries, *pairs.documents]
    assert pairs.false_negatives == sum(positives[i] == positives[j] for j in range(len(batch)) for i in range(j))
