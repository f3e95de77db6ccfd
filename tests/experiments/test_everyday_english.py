"""The shipped everyday English set, and the script that makes it."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.everyday_english.choosing import CLASSES, Query, answers
from experiments.everyday_english.make import HERE, LARGE, LARGE_PAIRS, SMALL, SMALL_PAIRS, grade, licence, main, make
from experiments.everyday_english.wordnet import Synset, read_synset, read_wordnet
from experiments.everyday_english.words import content, example, is_plain

WORDNET = Path("/usr/share/wordnet")
needs_wordnet = pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="needs WordNet's files: apt-get install wordnet-base")

NOUNS = """\
  1 This is a licence  \n\
00000100 03 n 01 entity 0 000 | that which exists  \n\
00000200 06 n 01 artifact 0 001 @ 00000100 n 0000 | a man-made object; "it was a Roman artifact"  \n\
00000300 05 n 02 animal 0 beast 0 001 @ 00000100 n 0000 | a living organism that moves  \n\
00000400 05 n 01 carnivore 0 001 @ 00000300 n 0000 | a flesh-eating mammal  \n\
00000500 05 n 02 dog 0 house_dog 0 002 @ 00000400 n 0000 #m 00000300 n 0000 | a domestic pet; "the dog barked all night"; "dogs bark"  \n\
00000600 05 n 01 cat 0 001 @ 00000400 n 0000 | feline mammal  \n\
00000700 06 n 01 car 0 001 @ 00000200 n 0000 | a motor vehicle  \n\
00000800 18 n 01 dog 1 002 @ 00000100 n 0000 ;u 00000100 n 0000 | informal term for a man  \n"""
VERBS = '00000900 38 v 01 dog 0 000 01 + 08 00 | go after; "The policeman chased the thief"  \n'
INDEX = {
    "noun": "  1 This is a licence  \ndog n 2 1 @ 2 1 00000500 00000800  \ncat n 1 1 @ 1 1 00000600  \ncar n 1 1 @ 1 0 00000700  \n",
    "verb": "dog v 1 0 1 0 00000900  \n",
}
COUNTS = "dog%1:05:00:: 1 42\ndog%1:18:01:: 2 1\ndog%2:38:00:: 1 2\nold%3:00:00:: 1 9\ngone%1:05:00:: 1 5\ncat%1:05:00:: 4 5\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with three words in WordNet's format; the counts have words and senses that the index lacks."""
    for name, text in {"data.noun": NOUNS, "data.verb": VERBS, "cntlist.rev": COUNTS}.items():
        (tmp_path / name).write_text(text)
    for part, text in INDEX.items():
        (tmp_path / f"index.{part}").write_text(text)
    return tmp_path


Rows = dict[str, list[dict[str, Any]]]
"""documents, queries and pairs."""


@pytest.fixture(scope="module")
def shipped() -> Rows:
    files = {name: HERE / "data" / f"{name}.jsonl" for name in ("documents", "queries", "pairs")}
    return {name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for name, file in files.items()}


def synset(gloss: str, *words: str, file: str = "noun.animal", examples: tuple[str, ...] = (), marked: bool = False) -> Synset:
    return Synset("n00000001", file, words, gloss, examples, (), marked)


def test_line_of_the_database_is_read():
    dog = read_synset(NOUNS.splitlines()[5])
    examples = ("the dog barked all night", "dogs bark")
    assert dog == Synset("n00000500", "noun.animal", ("dog", "house dog"), "a domestic pet", examples, ("n00000400",), marked=False)
    assert read_synset(NOUNS.splitlines()[8]).marked
    assert read_synset(VERBS.strip()).file == "verb.motion"


def test_senses_and_counts_are_read_by_word(files):
    wordnet = read_wordnet(files)
    assert len(wordnet.synsets) == 9
    assert wordnet.meanings("dog") == ["n00000500", "n00000800", "v00000900"]
    assert wordnet.tagged == {("dog", "n00000500"): 42, ("dog", "n00000800"): 1, ("dog", "v00000900"): 2}
    assert wordnet.hyponyms["n00000400"] == ["n00000500", "n00000600"]


def test_grades_follow_the_hierarchy(files):
    wordnet = read_wordnet(files)
    dog, cat, car, verb = "n00000500", "n00000600", "n00000700", "v00000900"
    assert wordnet.depth(dog) == 4
    assert wordnet.similarity(dog, dog) == 1
    assert wordnet.similarity(dog, cat) == pytest.approx(2 * 3 / (2 * 3 + 2))
    assert wordnet.similarity(dog, car) == pytest.approx(2 * 1 / (2 * 1 + 5))
    assert wordnet.similarity(dog, verb) == 0
    assert [grade(value) for value in (0, 0.19, 0.2, 0.75, 0.8, 1)] == [0, 0, 1, 3, 4, 4]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.noun"):
        read_wordnet(tmp_path)


def test_too_few_words(files):
    with pytest.raises(ValueError, match=r"10 documents a class.*noun.animal \(0\)"):
        make(read_wordnet(files), (SMALL, LARGE), (SMALL_PAIRS, LARGE_PAIRS))


@pytest.mark.parametrize(
    ("gloss", "word", "marked", "plain"),
    [
        ("feline mammal usually having thick soft fur", "cat", False, True),
        ("feline mammal usually having thick soft fur", "mammals of fur", False, False),  # a word of the gloss
        ("an animal of sorts", "cat", False, False),  # too short
        ("feline mammal (usually having thick soft fur", "cat", False, False),  # cut
        ("feline mammal usually having thick soft fur", "cat", True, False),
        ("an ethnic group of people with thick soft fur", "cat", False, False),
    ],
)
def test_plain_glosses(gloss, word, marked, plain):
    assert is_plain(synset(gloss, word, marked=marked)) == plain


def test_example_has_the_word_alone():
    examples = ("he moved on", "leaping and dancing they came", "She danced with joy")
    leap = synset("skip, leap, or move up and down", "dance", examples=examples)
    assert example(leap, "dance") == "She danced with joy"
    assert example(leap, "snap") is None
    assert content("The runner was running with dogs!") == {"runn", "dog"}


def test_second_answer_is_seen():
    meant, other = synset("one", "bank", file="noun.artifact"), synset("two", "bank", file="noun.location")
    alone, shown = Query("bank", None, meant, other), Query("bank", "she sat on the bank", meant, other)
    assert answers(alone, other)
    assert not answers(shown, other)
    assert answers(shown, synset("three", "bank", file="noun.artifact"))
    assert shown.text == 'bank, as in "she sat on the bank"'


def test_size_and_licence():
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file() and file.suffix != ".pyc") <= 2**20
    text = (HERE / "LICENSE-WordNet").read_text()
    assert "Permission to use, copy, modify and distribute this software and\ndatabase" in text
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in text
    assert text.endswith("Princeton University and LICENSEE agrees to preserve same.\n")


def test_counts_in_the_readme(shipped):
    readme = (HERE / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (\d[^|]*\| [^|]*\d) \|$", readme, flags=re.MULTILINE))
    counts = {
        "documents: glosses, as many of each class": lambda rows: len(rows["documents"]),
        "queries, each with one answer": lambda rows: len(rows["queries"]),
        "of these, words with an example": lambda rows: sum(query["text"] != query["word"] for query in rows["queries"]),
        "pairs with a similarity": lambda rows: len(rows["pairs"]),
        "distinct texts to embed": lambda rows: len({row["text"] for name in ("documents", "queries") for row in rows[name]}),
    }
    small = {name: [row for row in values if row["small"]] for name, values in shipped.items()}
    for name, count in counts.items():
        assert rows[name] == f"{count(small)} | {count(shipped)}", name


def test_no_query_is_answered_by_copying_words(shipped):
    by_id = {doc["id"]: doc for doc in shipped["documents"]}
    for query in shipped["queries"]:
        answer = by_id[query["answer"]]
        assert query["word"] in answer["words"]
        assert not content(query["text"]) & content(answer["text"]), query


def test_no_query_has_two_answers(shipped):
    by_id = {doc["id"]: doc for doc in shipped["documents"]}
    assert len({doc["text"] for doc in shipped["documents"]}) == len(by_id)
    assert len({query["text"] for query in shipped["queries"]}) == len(shipped["queries"])
    for query in shipped["queries"]:
        alone, kind = query["text"] == query["word"], by_id[query["answer"]]["class"]
        same = [doc["id"] for doc in shipped["documents"] if query["word"] in doc["words"] and (alone or doc["class"] == kind)]
        assert same == [query["answer"]]
        assert alone or query["word"] in by_id[query["rival"]]["words"]


def test_every_grade_and_class_is_as_frequent(shipped):
    for small, pairs, size in ((True, SMALL_PAIRS, SMALL), (False, LARGE_PAIRS, LARGE)):
        rows = {name: [row for row in values if row["small"] or not small] for name, values in shipped.items()}
        assert Counter(grade(pair["similarity"]) for pair in rows["pairs"]) == dict.fromkeys(range(5), pairs)
        assert Counter(doc["class"] for doc in rows["documents"]) == dict.fromkeys(CLASSES, size.documents)


def test_pairs_that_were_checked_by_hand(shipped):
    words = {doc["id"]: doc["words"][0] for doc in shipped["documents"]}
    grades = {frozenset((words[pair["one"]], words[pair["other"]])): pair["similarity"] for pair in shipped["pairs"]}
    ape, rat, goose = (grades[frozenset(pair)] for pair in (("monkey", "ape"), ("rat", "monkey"), ("limestone", "goose")))
    assert ape == pytest.approx(24 / 26, abs=1e-4)  # primate is the twelfth from the root, and one step above both
    assert rat == pytest.approx(22 / 26, abs=1e-4)  # placental is the eleventh, and two steps above both
    assert goose < 0.2


@needs_wordnet
def test_neighbours_in_wordnet_are_nearer():
    wordnet = read_wordnet(WORDNET)

    def near(one, other):
        return wordnet.similarity(wordnet.senses["noun", one][0], wordnet.senses["noun", other][0])

    assert near("dog", "cat") > near("dog", "car") > near("dog", "anger")
    assert near("car", "truck") > near("car", "spoon")
    assert near("joy", "anger") > near("joy", "apple")


@needs_wordnet
def test_script_writes_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make.py", str(WORDNET), "--output", str(tmp_path)])
    main()
    for file in ("LICENSE-WordNet", *(f"data/{name}.jsonl" for name in ("documents", "queries", "pairs"))):
        assert (tmp_path / file).read_bytes() == (HERE / file).read_bytes(), file
    assert licence(WORDNET) == (HERE / "LICENSE-WordNet").read_text()
