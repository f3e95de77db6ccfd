"""Cuts sequences into batches of a budget of tokens."""

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


def padded_batches(lengths: Tensor, tokens: int, extra: int = 0) -> Iterator[Tensor]:
    """Cuts sequences into parts of like lengths, the longest first, each of at most `tokens` tokens with its padding; [n_i] int64 each.

    There are as few parts as the budget allows, of sizes as even as it allows: 16 where 15 fit are cut into 8 and 8. A sequence that alone
    is longer is a part of its own.

    Args:
        lengths: [N] int64.
        extra: tokens that are added to every sequence, such as the rationales that are to be written.
    """
    order = lengths.argsort(descending=True, stable=True)
    fitting = (tokens // (lengths[order] + extra)).clamp(min=1).tolist()  # in a part that begins here
    start = 0
    while start < len(order):
        parts, end = 0, start
        while end < len(order):
            parts, end = parts + 1, end + fitting[end]
        count = min(fitting[start], -(-(len(order) - start) // parts))
        yield order[start : start + count]
        start += count


def embed_all(policy: Policy, rollouts: Rollouts, tokens: int) -> Tensor:
    """Returns [N, D] float32 embeddings, not normalised, of rollouts with a prompt each, in passes of at most `tokens` tokens."""
    embeddings, order = [], rollouts.lengths.argsort(descending=True, stable=True).cpu()  # packed: no padding
    for rows in packed_batches(rollouts, order, 1, tokens):
        embeddings.append(policy.embed(rollouts[rows.to(rollouts.lengths.device)], groups=torch.arange(len(rows))))
    return torch.cat(embeddings)[order.argsort().to(policy.device)]
