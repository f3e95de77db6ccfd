"""A user's files as MTEB tasks: scored by MTEB's evaluators, and errors by file and line."""

import json
from pathlib import Path

import mteb
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.own_data import Name, Text, read_rows
from src.evaluation.tasks.own_tasks import KINDS, find_own_tasks, own_task
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.policy.model import Policy
from tests.datamodules.builders import write
from tests.evaluation import builders
from tests.own_files import LABELS, SCORED, TEXTS, TOPICS, describe, tsv, write_own_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture
def encoder(tiny_policy: Policy) -> RationaleEncoder:
    return builders.encoder(tiny_policy)


def cosines(encoder: RationaleEncoder, pairs: list[tuple[int, int]]) -> list[float]:
    """Similarities of pairs of TEXTS, one pair at a time, from the encoder itself."""
    unit = [v / np.linalg.norm(v) for v in encoder.encode(TEXTS).astype(np.float64)]
    return [float(unit[a] @ unit[b]) for a, b in pairs]


def scores_of(encoder: RationaleEncoder, *files: Path) -> dict[str, float]:
    scores = run_tasks(encoder, [own_task(file) for file in files], None, "tiny")
    assert scores.failures == {}
    return scores.tasks


def test_mteb_scores_every_type(folder, encoder):
    tasks = [own_task(file) for file in find_own_tasks(folder).values()]
    scores = run_tasks(encoder, tasks, None, "tiny")
    assert scores.failures == {}
    assert set(scores.categories) == set(KINDS)
    assert all(0 <= score <= 1 for name, score in scores.tasks.items() if name != "MySTS")


def test_sts_is_the_spearman_of_scipy(folder, encoder):
    expected = spearmanr([score for score, _, _ in SCORED], cosines(encoder, [(a, b) for _, a, b in SCORED])).statistic
    assert scores_of(encoder, folder / "MySTS.yaml")["MySTS"] == pytest.approx(expected, abs=1e-9)


def test_pairs_are_the_average_precision_of_sklearn(folder, encoder, tmp_path):
    (tmp_path / "pairs.tsv").write_text((folder / "pairs.tsv").read_text())
    rest = "data: pairs.tsv\ncolumns: {sentence1: first, sentence2: second, label: same}\nmain_score: cosine_ap"
    scores = scores_of(encoder, describe(tmp_path, "Pairs", "PairClassification", rest))
    labels = [int(LABELS[a] == LABELS[b]) for _, a, b in SCORED]
    assert scores["Pairs"] == pytest.approx(average_precision_score(labels, cosines(encoder, [(a, b) for _, a, b in SCORED])))


def test_retrieval_is_the_ndcg_of_a_loop(folder, encoder):
    topics = list(TOPICS)
    queries, documents = encoder.encode(topics), encoder.encode([f"{label} {text}" for label, text in zip(LABELS, TEXTS, strict=True)])
    queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    gains = []
    for topic, query in zip(topics, queries, strict=True):
        ranked = sorted(range(len(TEXTS)), key=lambda i: -float(query @ documents[i]))
        dcg = sum(1 / np.log2(place + 2) for place, i in enumerate(ranked[:10]) if LABELS[i] == topic)
        gains.append(dcg / sum(1 / np.log2(place + 2) for place in range(LABELS.count(topic))))
    assert scores_of(encoder, folder / "MyRetrieval.yaml")["MyRetrieval"] == pytest.approx(np.mean(gains), abs=1e-5)


def test_titles_and_grades(encoder, tmp_path):
    """A document may be a title or a text alone; a grade may be written as 2.0."""
    documents = [("graphs", TEXTS[0]), ("", TEXTS[1]), (TEXTS[4], ""), (TEXTS[8], None), (None, TEXTS[9])]
    write(tmp_path / "corpus.jsonl", *[{"_id": i, "title": title, "text": text} for i, (title, text) in enumerate(documents)])
    write(tmp_path / "queries.jsonl", *[{"_id": "q", "text": "graphs"}])
    tsv(tmp_path / "qrels.tsv", [("query-id", "corpus-id", "score"), ("q", 0, 2.0), ("q", 1, 1), ("q", 4, 0)])
    file = describe(tmp_path, "Titles", "Retrieval", "corpus: corpus.jsonl\nqueries: queries.jsonl\nqrels: qrels.tsv")
    assert "Titles" in scores_of(encoder, file)
    task = own_task(file)
    task.load_data()
    split = task.dataset["default"]["test"]
    texts = [f"{row['title']} {row['text']}".strip() for row in split["corpus"]]
    assert texts == [f"graphs {TEXTS[0]}", TEXTS[1], TEXTS[4], TEXTS[8], TEXTS[9]]
    assert split["relevant_docs"] == {"q": {"0": 2, "1": 1, "4": 0}}


def test_reranking_in_rows_and_in_lists(folder, encoder, tmp_path):
    lists = [json.loads(line) for line in (folder / "rerank.jsonl").read_text().splitlines()]
    rows = [(row["query"], text, label) for row in lists for label, role in enumerate(("negative", "positive")) for text in row[role]]
    tsv(tmp_path / "rows.tsv", [("query", "document", "label"), *rows])
    scores = scores_of(encoder, folder / "MyReranking.yaml", describe(tmp_path, "Rows", "Reranking", "data: rows.tsv"))
    assert scores["Rows"] == scores["MyReranking"]


def test_revision_follows_content(folder, tmp_path):
    write_own_tasks(tmp_path)
    before = own_task(tmp_path / "MySTS.yaml").metadata.dataset["revision"]
    assert own_task(folder / "MySTS.yaml").metadata.dataset["revision"] == before
    (tmp_path / "sts.tsv").write_text((tmp_path / "sts.tsv").read_text().replace("4.8", "4.7"))
    assert own_task(tmp_path / "MySTS.yaml").metadata.dataset["revision"] != before


def test_scores_of_a_kind_are_those_of_mteb(folder):
    model = mteb.get_model("mteb/baseline-random-encoder")
    for file in find_own_tasks(folder).values():
        task = own_task(file)
        found = (
            mteb.evaluate(model, task, cache=None, overwrite_strategy="always", show_progress_bar=False).task_results[0].scores["test"][0]
        )
        names = set(KINDS[task.metadata.type].scores) - ({"ap", "ap_weighted"} if task.metadata.name == "MyClassification" else set())
        assert names <= found.keys()


@pytest.mark.parametrize(("kind", "name"), [("STS", "spearman_rho"), ("PairClassification", "ap"), ("Classification", "ndcg_at_10")])
def test_main_score_that_the_evaluator_lacks(tmp_path, kind, name):
    file = describe(tmp_path, "Mine", kind, f"data: rows.tsv\ntrain: train.tsv\nmain_score: {name}")
    with pytest.raises(ValueError, match=rf"Mine\.yaml: main_score '{name}' is none of {KINDS[kind].scores[0]}, "):
        find_own_tasks(tmp_path)
    with pytest.raises(ValueError, match=rf"Mine\.yaml: main_score '{name}'"):
        own_task(file)


def test_average_precision_needs_two_labels(folder, tmp_path):
    write_own_tasks(tmp_path)
    rest = "train: train.jsonl\ndata: test.jsonl\nmain_score: ap"
    with pytest.raises(ValueError, match=r"Three\.yaml: main_score 'ap' is none of accuracy, "):
        own_task(describe(tmp_path, "Three", "Classification", rest))


PAIR = {"sentence1": "a", "sentence2": "b"}


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("STS", [{"sentence1": "a", "score": 1}], r"rows.jsonl:1: sentence2: .*required; the fields are sentence1, score"),
        ("STS", [PAIR | {"score": 1}, PAIR | {"score": "high"}], r"rows.jsonl:2: score: .*number.*'high'"),
        ("STS", [PAIR | {"score": 1}, PAIR | {"score": float("nan")}], r"rows.jsonl:2: score: .*finite"),
        ("STS", [PAIR | {"score": 1}, PAIR | {"score": 1}], r"rows.jsonl: all scores are equal"),
        ("PairClassification", [PAIR | {"label": 2}], r"rows.jsonl:1: label: .* 1, not 2"),
        ("PairClassification", [PAIR | {"sentence1": " ", "label": 1}], r"rows.jsonl:1: sentence1 is empty"),
        ("PairClassification", [PAIR | {"label": 1}] * 2, r"rows.jsonl: all labels are equal"),
        ("Clustering", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], r"rows.jsonl: one label alone"),
        ("Clustering", [{"text": "a", "label": None}], r"rows.jsonl:1: label must be text, not null"),
        ("Reranking", [{"query": "q", "positive": "a", "negative": []}], r"rows.jsonl:1: positive: .*list"),
        ("Reranking", [{"query": "q", "document": "a"}], r"rows.jsonl:1: .*document and label"),
        ("Reranking", [{"query": "q", "positive": ["a"], "negative": []}], r"rows.jsonl has 1 rows"),
        ("STS", ["a"], r"rows.jsonl:1: a row is a JSON object"),
    ],
)
def test_bad_row(kind, rows, message, tmp_path):
    write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"Bad.yaml: .*{message}") as caught:
        own_task(describe(tmp_path, "Bad", kind, "data: rows.jsonl"))
    assert "\n" not in str(caught.value)


QRELS = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("MySTS", "sts.tsv", "1.0\ta\tb\n2.0\tc\n", r"sts.tsv:2: 2 fields between tabs, .* score, sentence1, sentence2"),
        ("MyRetrieval", "qrels.tsv", f"{QRELS}q0\t99\t1\n", r"qrels.tsv:2: '99' is not in .*corpus.jsonl"),
        ("MyRetrieval", "qrels.tsv", f"{QRELS}q0\t0\t1\nq0\t1\t0.5\n", r"qrels.tsv:3: score: .*integer.*'0.5'"),
        ("MyRetrieval", "corpus.jsonl", '{"_id": 0, "title": " ", "text": ""}\n', r"corpus.jsonl:1: text is empty"),
        ("MyRetrieval", "corpus.jsonl", '{"_id": 0, "title": "a"}\n', r"corpus.jsonl:1: text: .*required"),
        ("MyRetrieval", "queries.jsonl", '{"_id": 1, "text": "a"}\n' * 2, r"queries.jsonl: the id '1' is there twice"),
        ("MyRetrieval", "corpus.jsonl", "{\n", r"corpus.jsonl:1: not JSON"),
        (
            "MyClassification",
            "train.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n',
            r"test.jsonl: .*train.jsonl.* 'files'",
        ),
    ],
)
def test_bad_file(name, file, content, message, tmp_path):
    write_own_tasks(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        own_task(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: A\ntype: STS\ndata: nowhere.tsv", r"A.yaml: no file .*nowhere.tsv"),
        ("name: A\ntype: STS\ndata: ../A.tsv", r"A.yaml: '../A.tsv' leads out of"),
        ("name: A\ntype: STS", r"a task of type STS needs data"),
        ("name: A\ntype: Sts\ndata: x.tsv", r"type 'Sts' is none of STS, PairClassification"),
        ("name: A\ntype: STS\ndata: x.tsv\nscore: 1", r"score: .*not permitted; settings are name, type"),
        ("name: A/B\ntype: STS\ndata: x.tsv", r"name: .*'A/B'"),
        ("type: STS\ndata: x.tsv", r"name: .*required"),
        ("name: A\ntype: STS\ndata: A.yaml\ncolumns: score", r"columns.*list.*'score'"),
        ("name: A\ntype: STS\ndata: A.yaml", r"A.yaml: .*\.jsonl and \.tsv"),
        ("- a", r"A.yaml describes no task"),
        ("a: [", r"A.yaml is not YAML"),
    ],
)
def test_bad_description(content, message, tmp_path):
    (tmp_path / "A.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        own_task(tmp_path / "A.yaml")
    assert "\n" not in str(caught.value)


def test_two_tasks_of_one_name(tmp_path):
    describe(tmp_path, "Same", "STS", "data: x.tsv")
    (tmp_path / "more").mkdir()
    describe(tmp_path / "more", "Same", "STS", "data: x.tsv")
    with pytest.raises(ValueError, match=r"both describe a task named Same"):
        find_own_tasks(tmp_path)


@pytest.mark.parametrize("names", [("similarity", "score"), ("score", "similarity")])
def test_named_column_wins(names, tmp_path):
    values = {"similarity": "0.25", "score": "1"}
    tsv(tmp_path / "sts.tsv", [("sentence1", "sentence2", *names), ("a", "b", *(values[name] for name in names))])
    ((_, row),) = read_rows(tmp_path / "sts.tsv", {"score": "similarity"}, score=float)
    assert row == {"score": 0.25}
    write(tmp_path / "swapped.jsonl", *[{"text": "a label", "label": "a text"}])
    ((_, row),) = read_rows(tmp_path / "swapped.jsonl", {"text": "label", "label": "text"}, text=Text, label=Name)
    assert row == {"text": "a text", "label": "a label"}
