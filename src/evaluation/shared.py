"""Texts of an evaluation, shared over the ranks: rank 0 runs MTEB, and all ranks embed what it asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from src.modules.distributed.ranks import Ranks
from src.modules.encoder.encoder import RationaleEncoder

Vectors = tuple[np.ndarray, np.ndarray | None]
"""[N, D] float32 embeddings, and those of the prompts alone, if they were asked for and the engine gives them."""


def embed(encoder: RationaleEncoder, texts: Sequence[str], prompt_type: str | None, both: bool, ranks: Ranks) -> Vectors:
    """Embeds texts on all ranks; rank 0 calls it while the others `serve`.

    Args:
        both: whether the embeddings without rationales are returned too, of texts that are embedded with.

    Raises:
        RuntimeError, ValueError: what the encoder raised on any rank.
    """
    job = (list(texts), prompt_type, both)
    ranks.first(job)
    found = _shares(encoder, *job, ranks)
    for share in found:
        if isinstance(share, Exception):
            raise share
    # texts r, r + count, ... are those of rank r
    joined = [None if any(part is None for part in parts) else _interleaved(parts)[: len(texts)] for parts in zip(*found, strict=True)]
    return joined[0], joined[1]  # type: ignore[return-value]


def serve(encoder: RationaleEncoder, ranks: Ranks) -> Any:
    """Embeds shares on a rank above 0 until rank 0 calls `dismiss`; returns the value given there."""
    while isinstance(job := ranks.first(None), tuple):
        _shares(encoder, *job, ranks)
    return job


def dismiss(value: Any, ranks: Ranks) -> None:
    """Ends `serve` on the ranks above 0; `value` is no tuple."""
    ranks.first(value)


def _shares(encoder: RationaleEncoder, texts: list[str], prompt_type: str | None, both: bool, ranks: Ranks) -> list[Any]:
    """Returns what each rank made of its share: Vectors, or the exception that it raised.

    Shares are of one size, the first texts being embedded twice if need be: engines that work together are called equally often.
    """
    even = [texts[i % len(texts)] for i in range(-(-len(texts) // ranks.count) * ranks.count)]
    own: Vectors | Exception
    try:
        share = ranks.share(even)
        own = encoder.encode_both(share, prompt_type=prompt_type) if both else (encoder.encode(share, prompt_type=prompt_type), None)
    except (RuntimeError, ValueError) as error:  # told to the other ranks, which wait for this one, and raised on rank 0
        own = error
    return ranks.objects(own)


def _interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
