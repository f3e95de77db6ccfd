"""Chooses the documents (glosses) and queries (words) of the everyday set."""

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from experiments.everyday_english.wordnet import Synset, WordNet
from experiments.everyday_english.words import example, is_plain, overlap, term, uses

CLASSES = (
    *("noun.animal", "noun.artifact", "noun.body", "noun.communication", "noun.feeling", "noun.food", "noun.location", "noun.person"),
    *("noun.substance", "noun.time", "verb.cognition", "verb.communication", "verb.contact", "verb.motion", "verb.possession"),
)
"""Lexicographer files whose meaning needs no linguist, and that have enough everyday words."""

_MOST_ALIKE = 0.5  # of two glosses' words; above it either could answer for the other
_MAIN_SENSE = 0.6  # of a word's tags; a word alone asks for a sense that has as many or more


@dataclass(frozen=True)
class Size:
    """How much is chosen of each class.

    Attributes:
        documents: exactly.
        queries: where the class has so many.
    """

    documents: int
    queries: int


@dataclass(frozen=True)
class Query:
    """A word whose gloss is looked for.

    Attributes:
        word: as it is asked for.
        example: that shows which sense is meant; None where its main one is.
        answer: the synset.
        rival: a near miss: with an example another sense of the word, otherwise a neighbour in the hierarchy.
    """

    word: str
    example: str | None
    answer: Synset
    rival: Synset

    @property
    def text(self) -> str:
        """As it is embedded."""
        return f'{self.word}, as in "{self.example}"' if self.example else self.word


@dataclass
class Choice:
    """Grows by whole queries, and then by documents that answer none.

    Attributes:
        wordnet: what is chosen from.
        rng: of the order in which synsets are tried.
        documents: by id, in the order in which they were chosen.
        queries: in the order in which they were chosen.
    """

    wordnet: WordNet
    rng: random.Random
    documents: dict[str, Synset] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)

    @cached_property
    def terms(self) -> dict[str, str]:
        """The everyday word of every synset that may be a document, by id."""
        used = uses(self.wordnet)
        plain = [synset for synset in self.wordnet.synsets.values() if synset.file in CLASSES and is_plain(synset)]
        found = {synset.id: term(synset, self.wordnet, used) for synset in plain}
        return {id: word for id, word in found.items() if word}

    def grow(self, size: Size) -> None:
        """Adds queries in turn over the classes, then fills each class with documents.

        Raises:
            ValueError: a class has too few.
        """
        order = list(self.terms)
        self.rng.shuffle(order)
        by_class = {name: [self.wordnet.synsets[id] for id in order if self.wordnet.synsets[id].file == name] for name in CLASSES}
        waiting = {name: iter(by_class[name]) for name in CLASSES}
        for number in range(1, size.queries + 1):
            for name in CLASSES:
                while self._count(name) < number and (synset := next(waiting[name], None)):
                    self._ask(synset, size)
        for name in CLASSES:
            for synset in by_class[name]:
                if self._fits([synset], size):
                    self.documents.setdefault(synset.id, synset)
        self._check(size)

    def _count(self, name: str) -> int:
        return sum(query.answer.file == name for query in self.queries)

    def _room(self, name: str, size: Size, asked: str | None) -> int:
        free = size.documents - sum(doc.file == name for doc in self.documents.values())
        reserved = 0 if asked in (None, name) else size.queries - self._count(name)
        return free - reserved

    def _check(self, size: Size) -> None:
        filled = Counter(synset.file for synset in self.documents.values())
        short = [f"{name} ({filled[name]})" for name in CLASSES if filled[name] < size.documents]
        if short:
            raise ValueError(f"{size.documents} documents a class are asked for, and there are fewer of {', '.join(short)}")

    def _ask(self, synset: Synset, size: Size) -> None:
        """Adds the query for a synset, its answer and its rival, where all of them fit."""
        word = self.terms[synset.id]
        if any(query.word == word or query.answer.id == synset.id for query in self.queries):
            return
        shown = example(synset, word)
        for rival in self._other_senses(synset, word) if shown else self._neighbours(synset, word):
            query = Query(word, shown, synset, rival)
            others = [doc for doc in self.documents.values() if doc.id not in (synset.id, rival.id)]
            if self._fits([synset, rival], size, synset.file) and not any(answers(query, doc) for doc in [rival, *others]):
                self.documents |= {synset.id: synset, rival.id: rival}
                self.queries.append(query)
                return

    def _other_senses(self, synset: Synset, word: str) -> list[Synset]:
        """Senses of a word of another class, the most frequent first: what two senses of one class mean is often one thing."""
        ids = [id for id in self.wordnet.meanings(word) if id in self.terms]
        ids.sort(key=lambda id: -self.wordnet.tagged.get((word, id), 0))
        return [self.wordnet.synsets[id] for id in ids if self.wordnet.synsets[id].file != synset.file]

    def _neighbours(self, synset: Synset, word: str) -> list[Synset]:
        """Synsets below the same one, where the synset is the word's main sense."""
        total = sum(self.wordnet.tagged.get((word, id), 0) for id in self.wordnet.meanings(word))
        if self.wordnet.tagged.get((word, synset.id), 0) < _MAIN_SENSE * total:
            return []
        siblings = [id for above in synset.hypernyms for id in self.wordnet.hyponyms[above] if id in self.terms]
        found = [self.wordnet.synsets[id] for id in siblings if id != synset.id]
        return [sibling for sibling in found if sibling.file == synset.file and word not in sibling.words]

    def _fits(self, synsets: list[Synset], size: Size, asked: str | None = None) -> bool:
        """Whether those that are new leave no class too full, and no query with two answers or gloss with a double.

        Args:
            asked: the class of the query that they are for; other classes keep room for queries of their own.
        """
        new = [synset for synset in synsets if synset.id not in self.documents]
        if any(count > self._room(name, size, asked) for name, count in Counter(synset.file for synset in new).items()):
            return False
        present = list(self.documents.values())
        for synset in new:
            doubled = any(overlap(synset.gloss, doc.gloss) > _MOST_ALIKE for doc in present)
            if doubled or any(answers(query, synset) for query in self.queries):
                return False
            present.append(synset)
        return True


def answers(query: Query, synset: Synset) -> bool:
    """Whether a synset other than a query's own could answer it too: its word in a sense of the same class, or, without example, in any."""
    return query.word in synset.words and (query.example is None or synset.file == query.answer.file)
