"""Which words and glosses of WordNet are everyday English, and which texts share words."""

import re
from collections import Counter

from experiments.everyday_english.wordnet import Synset, WordNet

_WORD = re.compile(r"[a-z]+")
_TERM = re.compile(r"[a-z]{3,12}")
_LEAST_USES = {True: 6, False: 12}
"""Glosses and examples, of all in WordNet, that an everyday word occurs in: one that was tagged in text, and one that was not."""

_GLOSS_LENGTHS = range(20, 121)
_EXAMPLE_LENGTHS = range(15, 91)
_LEAST_WORDS = 3  # of a gloss, that say something
_LEAST_EXAMPLE = 4  # words
_PREFIX = 4  # letters: `runner` and `running` count as one word, and so do some that are not

_FUNCTION_WORDS = (
    "the and for with from that this these those who whom whose which what when where while into onto upon over under about "
    "out off its his her their our your him them she they you was were are been being has have had does did can could may might must "
    "shall should will would not nor but than then there here some any all each every either both one two such more most other another "
    "very especially usually often used use using between among without within through during before after because also only own same "
    "make made makes cause caused having something someone somebody person people thing things way act"
)
"""Words that a query may share with its gloss, for they say little."""

_SAY_LITTLE = frozenset(_FUNCTION_WORDS.split())

_INDELICATE = re.compile(
    r"\b(sex\w*|coit\w*|copulat\w*|genital\w*|penis|vagina\w*|breasts?|buttocks?|anus|anal|rectum|urin\w*|f(a)?eces|excret\w*|defecat\w*|"
    r"prostitut\w*|whore|slang|vulgar|obscen\w*|offensive|derogat\w*|disparag\w*|contempt\w*|insult\w*|ethnic|race|races|racial|negro\w*|"
    r"jew\w*|slave\w*|rape\w*|kill\w*|murder\w*|suicid\w*|tortur\w*|nazi|drug|drugs|homosexual\w*|gay|lesbian|bastard|bitch|fool|"
    r"crotch|pubic|testis|testic\w*|scrot\w*|menstru\w*|vulva|womb|semen|sperm\w*)\b",
    re.IGNORECASE,
)


def content(text: str) -> set[str]:
    """Returns the first letters of the words of a text that say something; `dogs` is `dog`."""
    words = [word for word in _WORD.findall(text.lower()) if len(word) > 2 and word not in _SAY_LITTLE]
    return {(word if word.endswith("ss") else word.removesuffix("s"))[:_PREFIX] for word in words}


def overlap(one: str, other: str) -> float:
    """Returns the share of words that two texts have in common, among those of either."""
    first, second = content(one), content(other)
    return len(first & second) / len(first | second) if first | second else 0.0


def uses(wordnet: WordNet) -> Counter[str]:
    """Returns in how many glosses and examples each word occurs."""
    counts: Counter[str] = Counter()
    for synset in wordnet.synsets.values():
        counts.update(set(_WORD.findall(" ".join((synset.gloss, *synset.examples)).lower())))
    return counts


def term(synset: Synset, wordnet: WordNet, used: Counter[str]) -> str | None:
    """Returns the everyday word that was tagged with the synset most often, or that means nothing else; None where it has none."""
    words = [word for word in synset.words if _TERM.fullmatch(word) and used[word] >= _LEAST_USES[(word, synset.id) in wordnet.tagged]]
    known = [word for word in words if (word, synset.id) in wordnet.tagged or len(wordnet.meanings(word)) == 1]
    return max(known, key=lambda word: wordnet.tagged.get((word, synset.id), 0), default=None)


def is_plain(synset: Synset) -> bool:
    """Whether its gloss is short, whole, decent and says what it means without its own words."""
    gloss = synset.gloss
    whole = len(gloss) in _GLOSS_LENGTHS and len(content(gloss)) >= _LEAST_WORDS and gloss.count("(") == gloss.count(")")
    decent = not synset.marked and not _INDELICATE.search(" ".join((gloss, *synset.words, *synset.examples)))
    return whole and decent and not any(content(word) & content(gloss) for word in synset.words)


def example(synset: Synset, word: str) -> str | None:
    """Returns the first example that has the word and shares none with the gloss; None where there is none."""
    form = re.compile(rf"\b{re.escape(word if len(word) < 4 else word.rstrip('ey'))}\w{{0,4}}\b", re.IGNORECASE)
    for text in synset.examples:
        whole = len(text) in _EXAMPLE_LENGTHS and len(text.split()) >= _LEAST_EXAMPLE
        if whole and form.search(text) and not content(text) & content(synset.gloss):
            return text
    return None
