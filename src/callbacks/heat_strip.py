"""Rationales as heat strips: which pieces of text brought the embedding nearer to its query, for the HTML report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LEVELS = 4
"""Shades of gain, and of loss."""

_QUANTILE = 0.95  # of the sizes of gains; larger ones have the strongest shade


@dataclass(frozen=True)
class Piece:
    """A token, or several that make one character: its text, CSS class (p1 .. p4, n1 .. n4 or "") and the numbers in words."""

    text: str
    shade: str
    title: str


@dataclass(frozen=True)
class Strip:
    """A rationale in pieces, and its summary in words."""

    pieces: list[Piece]
    summary: str


def gains(similarities: Sequence[float]) -> list[float]:
    """Returns what each piece adds to the similarity, [n] of [n + 1]."""
    return [after - before for before, after in pairwise(similarities)]


def scale_of(rows: Iterable[Sequence[float]]) -> float:
    """Returns the gain that has the strongest shade, one for all rows of similarities; 0 if there is none."""
    sizes = [abs(gain) for similarities in rows for gain in gains(similarities)]
    return float(np.quantile(sizes, _QUANTILE)) if sizes else 0.0


def strip(pieces: Sequence[str], similarities: Sequence[float], scale: float) -> Strip:
    """Returns a rationale for the page.

    Args:
        pieces: n texts.
        similarities: n + 1 cosines to the query: after the prompt, and after each piece.
        scale: see `scale_of`.
    """
    added = gains(similarities)
    shown = [
        Piece(text, _shade(gain, scale), f"{gain:+.4f}, now {now:.3f}")
        for text, gain, now in zip(pieces, added, similarities[1:], strict=True)
    ]
    best = [i for i in sorted(range(len(added)), key=lambda i: -added[i])[:3] if added[i] > 0 and pieces[i].strip()]
    most = ", ".join(f"“{pieces[i].strip()}” {added[i]:+.3f}" for i in best)
    summary = f"Similarity to the query: {similarities[0]:.3f} after the text, {similarities[-1]:.3f} after the rationale"
    return Strip(shown, summary + (f"; most by {most}." if most else "."))


def legend(scale: float) -> list[tuple[str, str]]:
    """Returns class and label of each shade, from the largest loss to the largest gain."""
    steps = [level for level in range(-LEVELS, LEVELS + 1) if level]
    return [(_name(level), f"{'≤ ' * (level == -LEVELS)}{'≥ ' * (level == LEVELS)}{scale * level / LEVELS:+.4f}") for level in steps]


def _shade(gain: float, scale: float) -> str:
    level = 0 if not scale else int(np.clip(round(LEVELS * gain / scale), -LEVELS, LEVELS))
    return _name(level)


def _name(level: int) -> str:
    return "" if not level else f"{'p' if level > 0 else 'n'}{abs(level)}"
