from hypothesis import given
from hypothesis import strategies as st

from src.modules.objectives.pairs import dropout_twice, supervised
from src.records import Triplet

few = st.sampled_from("abcdefg")
triplets = st.builds(Triplet, st.just("id"), few, few, st.lists(few, max_size=3).map(tuple))


@given(st.lists(triplets, min_size=1, max_size=8))
def test_supervised_pairs_leave_out_own_positives(batch: list[Triplet]) -> None:
    pairs = supervised(batch)
    assert pairs.queries == tuple(t.query for t in batch)
    texts = {t.positive for t in batch} | {n for t in batch for n in t.negatives}
    assert set(pairs.documents) == texts
    assert len(pairs.documents) == len(texts)
    for i, triplet in enumerate(batch):
        assert pairs.documents[pairs.own[i]] == triplet.positive
        others = {t.positive for t in batch if t.query == triplet.query} - {triplet.positive}
        assert {pairs.documents[j] for j in pairs.left_out[i].nonzero().flatten()} == others


@given(st.lists(triplets, min_size=1, max_size=8))
def test_dropout_pairs_texts_with_themselves(batch: list[Triplet]) -> None:
    pairs = dropout_twice(batch)
    assert pairs.queries == pairs.documents
    assert sorted(pairs.documents) == sorted({t.positive for t in batch})
    assert pairs.own.tolist() == list(range(len(pairs.documents)))
    assert not pairs.left_out.any()
    assert pairs.texts == [*pairs.queries, *pairs.documents]
