"""Cuts sequences into batches of a budget of tokens."""

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from src.modules.policy.model import Policy
from src.modules.types import Rollouts


def packed_batches(rollouts: Rollouts, rows: Tensor, k: int, tokens: int) -> Iterator[Tensor]:
    """Cuts rows, [n] int64 ascending with K to a text, into parts of at most `tokens` tokens where a prompt counts once; [n_i] int64 each.

    The rollouts of a text stay together if they fit, as its prompt is computed again in every part that has rollouts of it. A rollout that
    alone is longer is a part of its own.
    """
    prompts, own = rollouts.prompt_lengths.tolist(), rollouts.rationale_lengths.tolist()
    part: list[int] = []
    used = 0
    for _, members in groupby(rows.tolist(), lambda row: row // k):
        group = list(members)
        prompt = prompts[group[0]]
        if part and used + prompt + sum(own[row] for row in group) > tokens:
            yield torch.tensor(part)
            part, used = [], 0
        used += prompt
        for row in group:
            if part and used + own[row] > tokens:
                yield torch.tensor(part)
                part, used = [], prompt
            part.append(row)
            used += own[row]
    if part:
        yield torch.tensor(part)


def padded_batches(lengths: Tensor, tokens: int, extra: Tensor | None = None) -> Iterator[Tensor]:
    """Cuts sequences into parts of like lengths, the longest first, each of at most `tokens` tokens with its padding; [n_i] int64 each.

    Parts are as few and as even as the budget allows: 16 sequences where 15 fit are cut into 8 and 8. One that alone is longer is a part
    of its own.

    Args:
        lengths: [N] int64.
        extra: [N] int64, tokens that each sequence adds, not padded, such as the rationales that are to be written.
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order].tolist()
    added = [0, *(torch.zeros_like(lengths) if extra is None else extra[order]).cumsum(0).tolist()]
    ends, end = list[int](), 0  # of a part that begins at each place
    for start in range(len(order)):
        end = max(end, start + 1)
        while end < len(order) and (end + 1 - start) * longest[start] + added[end + 1] - added[start] <= tokens:
            end += 1
        ends.append(end)
    parts = [0] * (len(order) + 1)  # that sequences from each place on need
    for start in reversed(range(len(order))):
        parts[start] = 1 + parts[ends[start]]
    start = 0
    while start < len(order):
        even = math.ceil((len(order) - start) / parts[start])
        end = min(ends[start], start + even)
        while parts[end] >= parts[start]:  # those that are left would need one more
            end += 1
        yield order[start:end]
        start = end


def embed_all(policy: Policy, rollouts: Rollouts, tokens: int) -> Tensor:
    """Returns [N, D] float32 embeddings, not normalised, of rollouts with a prompt each, in passes of at most `tokens` tokens."""
    embeddings, order = [], rollouts.lengths.argsort(descending=True, stable=True).cpu()  # packed: no padding
    for rows in packed_batches(rollouts, order, 1, tokens):
        embeddings.append(policy.embed(rollouts[rows.to(rollouts.lengths.device)], groups=torch.arange(len(rows))))
    return torch.cat(embeddings)[order.argsort().to(policy.device)]
