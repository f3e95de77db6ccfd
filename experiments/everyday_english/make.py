"""Makes the everyday set of WordNet 3.0: `python -m experiments.everyday_english.make /usr/share/wordnet` (Debian's wordnet-base)."""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from experiments.everyday_english.choosing import Choice, Size
from experiments.everyday_english.wordnet import Synset, WordNet, read_wordnet

HERE = Path(__file__).parent
SMALL, LARGE = Size(documents=10, queries=4), Size(documents=70, queries=30)
SMALL_PAIRS, LARGE_PAIRS = 16, 80
"""Of each grade."""

GRADES = 5
_MOST_PAIRS = 4  # that a document is in, of either size
_LICENCE_LINES = 29

Row = dict[str, Any]


def documents(choices: Sequence[Choice], rng: random.Random) -> list[Row]:
    """Returns the documents of the small and the large choice, half of each class and size to train on, half to test on."""
    small, rows = set(choices[0].documents), []
    for is_small in (True, False):
        part = [doc for doc in choices[-1].documents.values() if (doc.id in small) == is_small]
        rng.shuffle(part)
        seen: Counter[str] = Counter()
        for doc in part:
            split = ("train", "test")[seen[doc.file] % 2]
            seen[doc.file] += 1
            told = {"id": doc.id, "class": doc.file, "words": list(doc.words), "text": doc.gloss}
            rows.append(told | {"split": split, "small": is_small})
    return rows


def queries(choices: Sequence[Choice]) -> list[Row]:
    """Returns the queries with the ids of their answer and of the near miss."""
    small = len(choices[0].queries)
    return [
        {"text": query.text, "word": query.word, "answer": query.answer.id, "rival": query.rival.id, "small": number < small}
        for number, query in enumerate(choices[-1].queries)
    ]


def grade(similarity: float) -> int:
    """Returns the fifth of the scale that a similarity lies in, 0 to 4."""
    return min(int(similarity * GRADES), GRADES - 1)


def graded_pairs(wordnet: WordNet, nouns: Iterable[Synset], count: int, rng: random.Random, taken: Sequence[Row] = ()) -> list[Row]:
    """Returns pairs of nouns that share no word, `count` of each grade, those that are taken already among them.

    Raises:
        ValueError: too few of a grade.
    """
    rows = list(taken)
    known = {(row["one"], row["other"]) for row in rows}
    uses = Counter(id for pair in known for id in pair)
    filled = Counter(grade(row["similarity"]) for row in rows)
    candidates = [(one, other) for one, other in combinations(nouns, 2) if not set(one.words) & set(other.words)]
    rng.shuffle(candidates)
    for one, other in candidates:
        similarity = round(wordnet.similarity(one.id, other.id), 4)
        full = filled[grade(similarity)] >= count or max(uses[one.id], uses[other.id]) >= _MOST_PAIRS
        if not full and (one.id, other.id) not in known:
            rows.append({"one": one.id, "other": other.id, "similarity": similarity})
            uses.update((one.id, other.id))
            filled[grade(similarity)] += 1
        if sum(filled.values()) == count * GRADES:
            return rows
    raise ValueError(f"{count} pairs of each grade are asked for, and there are {dict(sorted(filled.items()))}")


def make(wordnet: WordNet, sizes: tuple[Size, Size], pairs: tuple[int, int], seed: int = 0) -> dict[str, list[Row]]:
    """Returns the rows of documents, queries and pairs; those of the small set are marked.

    Raises:
        ValueError: WordNet has too few for a size.
    """
    rng = random.Random(seed)
    large = Choice(wordnet, rng)
    large.grow(sizes[0])
    small = Choice(wordnet, rng, dict(large.documents), list(large.queries))
    large.grow(sizes[1])
    rows: dict[str, list[Row]] = {"documents": documents([small, large], rng), "queries": queries([small, large])}
    drawn: list[Row] = []
    for choice, count in zip((small, large), pairs, strict=True):
        nouns = [doc for doc in choice.documents.values() if doc.id.startswith("n")]
        drawn = graded_pairs(wordnet, nouns, count, rng, drawn)
    rows["pairs"] = [row | {"small": number < pairs[0] * GRADES} for number, row in enumerate(drawn)]
    return rows


def licence(wordnet_folder: Path) -> str:
    """Returns the licence that WordNet's files begin with, without the numbers of its lines."""
    with (wordnet_folder / "data.noun").open(encoding="utf-8") as lines:
        return "".join(next(lines)[4:].strip() + "\n" for _ in range(_LICENCE_LINES))


def write(rows: dict[str, list[Row]], folder: Path) -> None:
    """Writes a file of JSON lines for each kind of row."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Writes the set and WordNet's licence, and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wordnet", type=Path, nargs="?", default=Path("/usr/share/wordnet"), help="folder with data.noun and the like")
    parser.add_argument("--output", type=Path, default=HERE, help="where the licence and data/ are written")
    arguments = parser.parse_args()
    rows = make(read_wordnet(arguments.wordnet), (SMALL, LARGE), (SMALL_PAIRS, LARGE_PAIRS))
    write(rows, arguments.output / "data")
    (arguments.output / "LICENSE-WordNet").write_text(licence(arguments.wordnet), encoding="utf-8")
    for name, values in rows.items():
        print(f"{name}: {len(values)}, {sum(row['small'] for row in values)} of them in the small set")


if __name__ == "__main__":
    main()
