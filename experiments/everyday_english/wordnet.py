"""Reads the database files of WordNet 3.0: synsets, how often each was tagged in text, and their hierarchy."""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PARTS = ("noun", "verb")
"""Parts of speech that have a hierarchy; adjectives and adverbs have none."""

LEXICOGRAPHER_FILES = {
    "noun": "Tops act animal artifact attribute body cognition communication event feeling food group location motive object person "
    "phenomenon plant possession process quantity relation shape state substance time",
    "verb": "body change cognition communication competition consumption contact creation emotion motion perception possession social "
    "stative weather",
}
"""Names of the files 03 to 28 (nouns) and 29 to 43 (verbs), in their order: see lexnames(5WN)."""

_NAMES = [f"{part}.{name}" for part in PARTS for name in LEXICOGRAPHER_FILES[part].split()]
_FIRST_FILE = 3
_HYPERNYMS = ("@", "@i")
_USAGE = ";u"  # slang, slurs, trademarks, figures of speech
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        id: part of speech and place in the file, `n02084071`.
        file: of its lexicographer, `noun.animal`.
        words: with spaces for underscores.
        gloss: its definition.
        examples: of use.
        hypernyms: ids.
        marked: whether it belongs to a domain of usage, such as slang.
    """

    id: str
    file: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]
    marked: bool


def read_synset(line: str) -> Synset:
    """Returns the synset of a line of data.noun or data.verb, see wndb(5WN)."""
    head, _, text = line.partition(" | ")
    fields = head.split()
    part, count = fields[2], int(fields[3], 16)
    words = tuple(fields[i].replace("_", " ") for i in range(4, 4 + 2 * count, 2))
    start = 5 + 2 * count
    pointers = [fields[i : i + 4] for i in range(start, start + 4 * int(fields[start - 1]), 4)]
    return Synset(
        id=part + fields[0],
        file=_NAMES[int(fields[1]) - _FIRST_FILE],
        words=words,
        gloss=text.split('"')[0].strip().rstrip(";: ").strip(),
        examples=tuple(example.strip() for example in _EXAMPLE.findall(text)),
        hypernyms=tuple(kind_part + offset for symbol, offset, kind_part, _ in pointers if symbol in _HYPERNYMS),
        marked=any(pointer[0] == _USAGE for pointer in pointers),
    )


@dataclass(frozen=True)
class WordNet:
    """Nouns and verbs.

    Attributes:
        synsets: by id.
        senses: ids of a word's synsets by part of speech and word, the most frequent first.
        tagged: how often a word was tagged with a synset, by word and id; without those that never were.
    """

    synsets: dict[str, Synset]
    senses: dict[tuple[str, str], tuple[str, ...]]
    tagged: dict[tuple[str, str], int]

    @cached_property
    def hyponyms(self) -> dict[str, list[str]]:
        """Ids of the synsets directly below each, in the order of the files."""
        below: dict[str, list[str]] = defaultdict(list)
        for synset in self.synsets.values():
            for above in synset.hypernyms:
                below[above].append(synset.id)
        return below

    def meanings(self, word: str) -> list[str]:
        """Returns the ids of a word's synsets, nouns first."""
        return [id for part in PARTS for id in self.senses.get((part, word), ())]

    def ancestors(self, synset: str) -> dict[str, int]:
        """Returns the fewest steps up to each synset above this one, and 0 for itself."""
        found, level = {synset: 0}, [synset]
        while level:
            level = [above for below in level for above in self.synsets[below].hypernyms if above not in found]
            steps = 1 + max(found.values())
            found |= dict.fromkeys(level, steps)
        return found

    def depth(self, synset: str) -> int:
        """Returns how many synsets lie on the shortest way to a root, both ends among them."""
        return 1 + min(steps for above, steps in self.ancestors(synset).items() if not self.synsets[above].hypernyms)

    def similarity(self, one: str, other: str) -> float:
        """Returns the similarity of Wu and Palmer, from 0 (no root in common) to 1 (the same synset).

        It is 2 d / (2 d + steps), where d is the depth of a synset above both and `steps` lead to it from the two; of the
        synsets above both, the one that makes it largest.
        """
        first, second = self.ancestors(one), self.ancestors(other)
        shared = [(self.depth(above), first[above] + second[above]) for above in first.keys() & second.keys()]
        return max((2 * depth / (2 * depth + steps) for depth, steps in shared), default=0.0)


def read_wordnet(folder: Path) -> WordNet:
    """Reads data.*, index.* and cntlist.rev of a folder.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    synsets: dict[str, Synset] = {}
    senses: dict[tuple[str, str], tuple[str, ...]] = {}
    for part in PARTS:
        lines = _lines(folder / f"data.{part}")
        synsets |= {synset.id: synset for synset in map(read_synset, lines)}
        for line in _lines(folder / f"index.{part}"):
            word, letter, count, *_ = line.split()
            senses[part, word.replace("_", " ")] = tuple(letter + offset for offset in line.split()[-int(count) :])
    tagged = {}
    for line in _lines(folder / "cntlist.rev"):
        key, number, count = line.split()
        word, _, rest = key.replace("_", " ").partition("%")
        part_number = int(rest[0])  # 1: nouns, 2: verbs
        ids = senses.get((PARTS[part_number - 1], word), ()) if part_number <= len(PARTS) else ()
        if int(number) <= len(ids):  # the list also has words of earlier versions
            tagged[word, ids[int(number) - 1]] = int(count)
    return WordNet(synsets, senses, tagged)


def _lines(file: Path) -> list[str]:
    """Returns its lines without those of the licence, which begin with a space."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]
