"""Naive loops written from the equations; fast code is tested against them. Slow on purpose, plain on purpose."""

import torch
from torch import Tensor


def mean_of_selected(hidden: Tensor, mask: Tensor) -> Tensor:
    """h = mean of the hidden states that the mask selects, token by token; [N, T, D] and [N, T] -> [N, D]."""
    rows = []
    for states, selected in zip(hidden, mask, strict=True):
        total, count = torch.zeros(hidden.shape[-1], dtype=torch.float64), 0
        for state, keep in zip(states, selected.tolist(), strict=True):
            if keep:
                total, count = total + state.double(), count + 1
        rows.append(total / count)
    return torch.stack(rows)


def logprobs_of_targets(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(W h / T)[target] and the entropy of that distribution, from all logits in float64; both [n]."""
    logprobs, entropies = [], []
    for state, target in zip(hidden.double(), targets.tolist(), strict=True):
        distribution = torch.log_softmax(weight.double() @ state / temperature, dim=-1)
        logprobs.append(distribution[target])
        entropies.append(-(distribution.exp() * distribution).sum())
    return torch.stack(logprobs), torch.stack(entropies)


# ---- rewards, advantages and losses, one number at a time (GRACE, arXiv 2510.04506, section 3)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def consistency_oracle(positive: Tensor, i: int, k: int) -> Tensor:
    rollouts = positive.shape[1]
    others = [_dot(positive[i, k], positive[i, other]) for other in range(rollouts) if other != k]
    return torch.stack(others).sum() / len(others) if others else positive.new_zeros(())


def paper_oracle(query: Tensor, positive: Tensor, negative: Tensor, lambda1: float, lambda2: float, temperature: float) -> Tensor:
    b, k = positive.shape[:2]
    rows = []
    for i in range(b):
        row = []
        for r in range(k):
            value = _dot(query[i], positive[i, r])
            for m in range(negative.shape[1]):
                value = value - _dot(query[i], negative[i, m])
            value = value + lambda1 * consistency_oracle(positive, i, r)
            for j in range(b):
                if j != i:
                    value = value - lambda2 / (b - 1) * torch.stack([_dot(query[i], positive[j, other]) for other in range(k)]).max()
            row.append(value / temperature)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def document_oracle(
    query: Tensor, positive: Tensor, negative: Tensor, lambda1: float, lambda2: float, temperature: float, hard: str
) -> Tensor:
    b, k = positive.shape[:2]
    rows = []
    for i in range(b):
        row = []
        for r in range(k):
            value = _dot(query[i], positive[i, r])
            for m in range(negative.shape[1]):
                value = value - _dot(positive[i, r], negative[i, m])
            value = value + lambda1 * consistency_oracle(positive, i, r)
            rivals = [_dot(positive[i, r], query[j]) for j in range(b) if j != i]
            if rivals:
                stacked = torch.stack(rivals)
                value = value - lambda2 * (stacked.mean() if hard == "mean" else stacked.max())
            row.append(value / temperature)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def unsupervised_oracle(anchor: Tensor, positive: Tensor, lambda1: float, lambda2: float, temperature: float) -> Tensor:
    b, k = positive.shape[:2]
    rows = []
    for i in range(b):
        row = []
        for r in range(k):
            value = _dot(anchor[i], positive[i, r]) + lambda1 * consistency_oracle(positive, i, r)
            for j in range(b):
                if j != i:
                    value = value - lambda2 / (b - 1) * _dot(positive[i, r], anchor[j])
            row.append(value / temperature)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def listwise_oracle(
    query: Tensor, positive: Tensor, negative: Tensor, to_query: float, to_document: float, lambda1: float, temperature: float
) -> Tensor:
    b, k = positive.shape[:2]

    def centred(i: int, document: Tensor) -> Tensor:
        """exp of the document's similarity to query i, less its mean over the queries."""
        similarities = [_dot(query[j], document) / temperature for j in range(b)]
        return (similarities[i] - sum(similarities) / b).exp()

    rows = []
    for i in range(b):
        row = []
        for r in range(k):
            own = centred(i, positive[i, r])
            queries = sum(centred(j, positive[i, r]) for j in range(b))
            documents = own
            for m in range(negative.shape[1]):
                documents = documents + centred(i, negative[i, m])
            for j in range(b):
                if j != i:
                    documents = documents + centred(i, positive[j].mean(dim=0))
            value = to_query * (own / queries).log() + to_document * (own / documents).log()
            row.append(value + lambda1 * consistency_oracle(positive, i, r))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def grpo_oracle(rewards: Tensor, keep: Tensor, std: bool) -> Tensor:
    out = torch.zeros_like(rewards)
    for i in range(rewards.shape[0]):
        kept = [r for r in range(rewards.shape[1]) if keep[i, r]]
        if len(kept) < 2:
            continue
        values = torch.stack([rewards[i, r] for r in kept])
        scale = values.std() + 1e-6 if std else 1.0
        for r in kept:
            out[i, r] = (rewards[i, r] - values.mean()) / scale
    return out


def ppo_clip_oracle(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    total = logprobs.new_zeros(())
    for n in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            if mask[n, t]:
                ratio = (logprobs[n, t] - old[n, t]).exp()
                clipped = min(max(ratio, torch.tensor(1 - low, dtype=ratio.dtype)), torch.tensor(1 + high, dtype=ratio.dtype))
                total = total - torch.minimum(ratio * advantages[n], clipped * advantages[n])
    return total
