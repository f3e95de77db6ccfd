"""Naive loops written from the equations; fast code is tested against them. Slow on purpose, plain on purpose."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.roles import role_reward, texts_of
from src.modules.objectives.shaping import truncated_reward
from src.modules.policy.model import Policy
from src.modules.types import ROLES, Embeddings, Role, Rollouts, without_rationales
from src.records import Triplet
from tests.builders import flat, trained


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


def _table(b: int, k: int, value: Callable[[int, int], Tensor]) -> Tensor:
    """[b, k] of value(i, r)."""
    return torch.stack([torch.stack([value(i, r) for r in range(k)]) for i in range(b)])


def paper_oracle(query: Tensor, positive: Tensor, negative: Tensor, lambda1: float, lambda2: float, temperature: float) -> Tensor:
    b, k = positive.shape[:2]

    def reward(i: int, r: int) -> Tensor:
        value = _dot(query[i], positive[i, r])
        for m in range(negative.shape[1]):
            value = value - _dot(query[i], negative[i, m])
        value = value + lambda1 * consistency_oracle(positive, i, r)
        for j in range(b):
            if j != i:
                value = value - lambda2 / (b - 1) * torch.stack([_dot(query[i], positive[j, other]) for other in range(k)]).max()
        return value / temperature

    return _table(b, k, reward)


def document_oracle(
    query: Tensor, positive: Tensor, negative: Tensor, lambda1: float, lambda2: float, temperature: float, hard: str
) -> Tensor:
    b, k = positive.shape[:2]

    def reward(i: int, r: int) -> Tensor:
        value = _dot(query[i], positive[i, r])
        for m in range(negative.shape[1]):
            value = value - _dot(positive[i, r], negative[i, m])
        value = value + lambda1 * consistency_oracle(positive, i, r)
        rivals = [_dot(positive[i, r], query[j]) for j in range(b) if j != i]
        if rivals:
            value = value - lambda2 * (torch.stack(rivals).mean() if hard == "mean" else torch.stack(rivals).max())
        return value / temperature

    return _table(b, k, reward)


def novelty_oracle(base: Tensor, positive: Tensor, previous: Tensor, scale: float, weight: float) -> Tensor:
    def added(i: int, r: int) -> Tensor:
        return -scale * weight * torch.stack([_dot(positive[i, r], previous[j]) for j in range(len(previous))]).mean()

    return base + _table(*positive.shape[:2], added)


def unsupervised_oracle(anchor: Tensor, positive: Tensor, lambda1: float, lambda2: float, temperature: float) -> Tensor:
    b, k = positive.shape[:2]

    def reward(i: int, r: int) -> Tensor:
        value = _dot(anchor[i], positive[i, r]) + lambda1 * consistency_oracle(positive, i, r)
        for j in range(b):
            if j != i:
                value = value - lambda2 / (b - 1) * _dot(positive[i, r], anchor[j])
        return value / temperature

    return _table(b, k, reward)


def listwise_oracle(
    query: Tensor, positive: Tensor, negative: Tensor, to_query: float, to_document: float, lambda1: float, temperature: float, centre: str
) -> Tensor:
    b, k = positive.shape[:2]
    documents_of_batch = [positive[j, other] for j in range(b) for other in range(k)]

    def weight(i: int, document: Tensor) -> Tensor:
        """exp of the document's similarity to query i over tau, less the means that `centre` names."""
        value = _dot(query[i], document) / temperature
        if centre in ("document", "both"):
            value = value - sum(_dot(query[j], document) / temperature for j in range(b)) / b
        if centre == "both":
            value = value - sum(_dot(query[i], other) / temperature for other in documents_of_batch) / len(documents_of_batch)
        return value.exp()

    def reward(i: int, r: int) -> Tensor:
        own = weight(i, positive[i, r])
        queries = sum(weight(j, positive[i, r]) for j in range(b))
        documents = own
        for m in range(negative.shape[1]):
            documents = documents + weight(i, negative[i, m])
        for j in range(b):
            if j != i:
                documents = documents + weight(i, positive[j].mean(dim=0))
        value = to_query * (own / queries).log() + to_document * (own / documents).log()
        return value + lambda1 * consistency_oracle(positive, i, r)

    return _table(b, k, reward)


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


def rloo_oracle(rewards: Tensor, keep: Tensor) -> Tensor:
    """R_k - 1/(n-1) sum over the group's other kept rollouts (arXiv 2402.14740, eq. 7)."""
    out = torch.zeros_like(rewards)
    for i, k in keep.nonzero().tolist():
        others = [rewards[i, r] for r in range(rewards.shape[1]) if keep[i, r] and r != k]
        if others:
            out[i, k] = rewards[i, k] - sum(others) / len(others)
    return out


def remax_oracle(rewards: Tensor, keep: Tensor, baseline: Tensor) -> Tensor:
    """R_k less the greedy rollout's reward (arXiv 2310.10505, algorithm 1)."""
    out = torch.zeros_like(rewards)
    for i, k in keep.nonzero().tolist():
        out[i, k] = rewards[i, k] - baseline[i]
    return out


def reinforce_pp_oracle(rewards: Tensor, keep: Tensor) -> Tensor:
    """(R - mean over the batch) / std over the batch (arXiv 2501.03262)."""
    out = torch.zeros_like(rewards)
    places = keep.nonzero().tolist()
    if len(places) < 2:
        return out
    values = torch.stack([rewards[i, k] for i, k in places])
    for i, k in places:
        out[i, k] = (rewards[i, k] - values.mean()) / (values.std() + 1e-6)
    return out


def reinforce_pp_baseline_oracle(rewards: Tensor, keep: Tensor) -> Tensor:
    """A' = R - mean over the group, then (A' - mean over the batch) / std over the batch (arXiv 2501.03262)."""
    compared = torch.stack([row if row.sum() > 1 else torch.zeros_like(row) for row in keep])
    return reinforce_pp_oracle(grpo_oracle(rewards, keep, std=False), compared)


def ppo_clip_oracle(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    total = logprobs.new_zeros(())
    for n in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            if mask[n, t]:
                ratio = (logprobs[n, t] - old[n, t]).exp()
                clipped = min(max(ratio, torch.tensor(1 - low, dtype=ratio.dtype)), torch.tensor(1 + high, dtype=ratio.dtype))
                total = total - torch.minimum(ratio * advantages[n], clipped * advantages[n])
    return total


# ---- objectives of the algorithms, from rewards to a number to be made small, as their papers write them


@dataclass
class Case:
    """A rollout batch: B instances, K rollouts, T tokens at most.

    rewards [B, K], greedy [B], lengths [B, K]; logprobs, old and reference [B, K, T], of which `lengths` tokens count; more [B, K], a
    second term of the reward.
    """

    rewards: Tensor
    greedy: Tensor
    lengths: Tensor
    logprobs: Tensor
    old: Tensor
    reference: Tensor
    more: Tensor

    def rollouts(self) -> list[tuple[int, int]]:
        b, k = self.rewards.shape
        return [(i, r) for i in range(b) for r in range(k)]

    def sum_over_tokens(self, value: Callable[[int, int, int], Tensor]) -> Tensor:
        """The sum of value(i, k, t) over the tokens that count."""
        total = torch.zeros((), dtype=torch.float64)
        for i, k in self.rollouts():
            for t in range(int(self.lengths[i, k])):
                total = total + value(i, k, t)
        return total

    def clipped(self, i: int, k: int, t: int, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
        """min[r A, clip(r, 1 - low, 1 + high) A]."""
        ratio = (self.logprobs[i, k, t] - self.old[i, k, t]).exp()
        return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def _centred(rewards: Tensor, i: int, k: int, std: bool = False) -> Tensor:
    return (rewards[i, k] - rewards[i].mean()) / (rewards[i].std() + 1e-6 if std else 1.0)


def grpo_objective(case: Case, beta: float) -> Tensor:
    """-(1/G) sum_i (1/|o_i|) sum_t {min[r A, clip(r) A] - beta D_KL} with A = (R - mean) / std (arXiv 2402.03300, eq. 3 and 4)."""

    def token(i: int, k: int, t: int) -> Tensor:
        log_r = case.reference[i, k, t] - case.logprobs[i, k, t]
        divergence = log_r.exp() - log_r - 1
        return (case.clipped(i, k, t, _centred(case.rewards, i, k, std=True)) - beta * divergence) / case.lengths[i, k]

    return -case.sum_over_tokens(token) / len(case.rollouts())


def _centred_objective(case: Case) -> Tensor:
    return -case.sum_over_tokens(lambda i, k, t: case.clipped(i, k, t, _centred(case.rewards, i, k)))


def grace_objective(case: Case) -> Tensor:
    """Token mean of PPO's clipped surrogate with A = R - mean (arXiv 2510.04506)."""
    return _centred_objective(case) / case.lengths.sum()


def dr_grpo_objective(case: Case, constant: int) -> Tensor:
    """-(1/G) sum_i sum_t min[r A, clip(r) A] / constant with A = R - mean (arXiv 2503.20783)."""
    return _centred_objective(case) / constant / len(case.rollouts())


def _reinforce_objective(case: Case, advantages: Tensor, constant: int) -> Tensor:
    return -case.sum_over_tokens(lambda i, k, t: advantages[i, k] * case.logprobs[i, k, t]) / constant / len(case.rollouts())


def rloo_objective(case: Case, constant: int) -> Tensor:
    """-(1/k) sum_i (R_i - mean of the others) log pi(y_i) (arXiv 2402.14740, eq. 7), over a constant."""
    return _reinforce_objective(case, rloo_oracle(case.rewards, torch.ones_like(case.rewards, dtype=torch.bool)), constant)


def remax_objective(case: Case, constant: int) -> Tensor:
    """-mean (R - R of the greedy rollout) log pi(y) (arXiv 2310.10505, algorithm 1), over a constant."""
    return _reinforce_objective(case, case.rewards - case.greedy.unsqueeze(1), constant)


def reinforce_pp_objective(case: Case, beta: float, baseline: bool) -> Tensor:
    """Token mean of the clipped surrogate with advantages standardised over the batch (arXiv 2501.03262).

    Without the baseline, beta times the summed k1 is taken off the rewards; with it, beta times k2 is added to the loss.
    """
    rewards = case.rewards.clone()
    everything = torch.ones_like(rewards, dtype=torch.bool)
    if not baseline:
        for i, k in case.rollouts():
            for t in range(int(case.lengths[i, k])):
                rewards[i, k] = rewards[i, k] - beta * (case.old[i, k, t] - case.reference[i, k, t])
    advantages = reinforce_pp_baseline_oracle(rewards, everything) if baseline else reinforce_pp_oracle(rewards, everything)

    def token(i: int, k: int, t: int) -> Tensor:
        divergence = (case.logprobs[i, k, t] - case.reference[i, k, t]) ** 2 / 2
        return beta * divergence * baseline - case.clipped(i, k, t, advantages[i, k])

    return case.sum_over_tokens(token) / case.lengths.sum()


def overlong_oracle(length: int, max_tokens: int, cache: float) -> float:
    """The three cases of arXiv 2503.14476, eq. 13."""
    if length <= max_tokens - cache:
        return 0.0
    return (max_tokens - cache - length) / cache if length <= max_tokens else -1.0


def dapo_objective(case: Case, max_tokens: int) -> Tensor:
    """-1/(sum |o_i|) sum_i sum_t min[r A, clip(r, 0.8, 1.28) A], A = (R - mean) / std (arXiv 2503.14476, eq. 8 and 9)."""
    rewards = case.rewards.clone()
    for i, k in case.rollouts():
        rewards[i, k] = rewards[i, k] + overlong_oracle(int(case.lengths[i, k]), max_tokens, max_tokens / 5)
    total = case.sum_over_tokens(lambda i, k, t: case.clipped(i, k, t, _centred(rewards, i, k, std=True), 0.2, 0.28))
    return -total / case.lengths.sum()


def gspo_objective(case: Case) -> Tensor:
    """-(1/G) sum_i min[s_i A_i, clip(s_i) A_i], s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|), A = (R - mean) / std (arXiv 2507.18071)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, k in case.rollouts():
        length = int(case.lengths[i, k])
        s = (sum(case.logprobs[i, k, t] - case.old[i, k, t] for t in range(length)) / length).exp()
        advantage = _centred(case.rewards, i, k, std=True)
        total = total - torch.minimum(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
    return total / len(case.rollouts())


def cispo_objective(case: Case) -> Tensor:
    """-1/(sum |o_i|) sum_i sum_t sg(min(r_t, 5)) A_i log pi(t), A = (R - mean) / std (arXiv 2506.13585, eq. 4 and 5)."""

    def token(i: int, k: int, t: int) -> Tensor:
        weight = min(float((case.logprobs.detach()[i, k, t] - case.old[i, k, t]).exp()), 5.0)
        return weight * _centred(case.rewards, i, k, std=True) * case.logprobs[i, k, t]

    return -case.sum_over_tokens(token) / case.lengths.sum()


def sapo_objective(case: Case) -> Tensor:
    """-(1/G) sum_i (1/|y_i|) sum_t (4/tau) sigmoid(tau (r_t - 1)) A_i, tau by the advantage's sign (arXiv 2511.20347)."""

    def token(i: int, k: int, t: int) -> Tensor:
        advantage = _centred(case.rewards, i, k, std=True)
        tau = 1.0 if advantage > 0 else 1.05
        ratio = (case.logprobs[i, k, t] - case.old[i, k, t]).exp()
        return 4 / tau / (1 + (-tau * (ratio - 1)).exp()) * advantage / case.lengths[i, k]

    return -case.sum_over_tokens(token) / len(case.rollouts())


def gdpo_objective(case: Case) -> Tensor:
    """The clipped surrogate; A is the sum of two terms, each standardised by group, standardised over the batch (arXiv 2601.05242)."""
    summed = torch.zeros_like(case.rewards)
    for i, k in case.rollouts():
        for weight, term in ((1.0, case.rewards), (0.5, case.more)):
            summed[i, k] = summed[i, k] + weight * (term[i, k] - term[i].mean()) / (term[i].std() + 1e-4)
    advantages = reinforce_pp_oracle(summed, torch.ones_like(summed, dtype=torch.bool))
    total = case.sum_over_tokens(lambda i, k, t: case.clipped(i, k, t, advantages[i, k]) / case.lengths[i, k])
    return -total / len(case.rollouts())


def raft_objective(case: Case) -> Tensor:
    """-K/(sum |o_i|) sum over texts of log pi of the best rationale of K (arXiv 2304.06767)."""
    return (
        -case.rewards.shape[1]
        * case.sum_over_tokens(lambda i, k, t: case.logprobs[i, k, t] * (k == int(case.rewards[i].argmax())))
        / case.lengths.sum()
    )


def copg_objective(case: Case, beta: float, constant: int) -> Tensor:
    """Pairs of rollouts: -(R_b(y) - R_b(y')) (log pi(y) - log pi(y')), R_b = R - b log pi/pi_ref held constant (arXiv 2406.19185).

    Over the K - 1 pairs that each rollout is in, divided as `rloo` is.
    """
    rollouts = case.rewards.shape[1]
    total = torch.zeros((), dtype=torch.float64)

    def own(values: Tensor, i: int, k: int) -> Tensor:
        return values[i, k, : int(case.lengths[i, k])].sum()

    def regularised(i: int, k: int) -> float:
        return float(case.rewards[i, k] - beta * (own(case.logprobs.detach(), i, k) - own(case.reference, i, k)))

    for i in range(case.rewards.shape[0]):
        for k in range(rollouts):
            for other in range(k):
                apart = own(case.logprobs, i, k) - own(case.logprobs, i, other)
                total = total - (regularised(i, k) - regularised(i, other)) * apart / (rollouts - 1)
    return total / constant / len(case.rollouts())


def expected_ndcg(scores: Tensor, depth: int) -> Tensor:
    """E[nDCG] of the first of some documents over all rankings, each with its Plackett-Luce probability; scores [C] -> scalar."""
    total = scores.new_zeros(())
    for ranking in itertools.permutations(range(len(scores))):
        probability, left = scores.new_ones(()), list(ranking)
        for document in ranking:
            probability = probability * scores[document].exp() / torch.stack([scores[d].exp() for d in left]).sum()
            left.remove(document)
        place = ranking.index(0) + 1
        total = total + probability * (1 / math.log2(1 + place) if place <= depth else 0.0)
    return total


# ---- poolings


def last_of_selected(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last state that the mask selects, row by row."""
    return torch.stack([[state for state, keep in zip(*row, strict=True) if keep][-1].double() for row in zip(hidden, mask, strict=True)])


def max_of_selected(hidden: Tensor, mask: Tensor) -> Tensor:
    """Coordinate by coordinate the greatest of the states that the mask selects."""
    rows = []
    for states, selected in zip(hidden, mask, strict=True):
        kept = [state.double() for state, keep in zip(states, selected, strict=True) if keep]
        rows.append(functools.reduce(torch.maximum, kept))
    return torch.stack(rows)


# ---- contrastive learning


def info_nce_oracle(queries: Tensor, candidates: list[list[Tensor]], own: list[int], temperature: float) -> Tensor:
    """-log(exp(cos(q_i, d_own)/tau) / sum_j exp(cos(q_i, d_j)/tau)), mean over i, each query with its own list of candidates."""
    losses = []
    for query, documents, place in zip(queries, candidates, own, strict=True):
        scores = [(_dot(query, d) / (query.norm() * d.norm()) / temperature).exp() for d in documents]
        losses.append(-(scores[place] / torch.stack(scores).sum()).log())
    return torch.stack(losses).mean()


# ---- a training step: all roles in one graph


def read_plainly(policy: Policy, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, D], and log-probs [N, T - 1] of the rationales' tokens, by transformers' own forward pass of padded rows."""
    output = policy.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long(), output_hidden_states=True)
    rows = []
    for states, start, end in zip(
        output.hidden_states[policy.layer], rollouts.text_starts.tolist(), rollouts.lengths.tolist(), strict=True
    ):
        own = states[start:end]
        rows.append({"mean": own.mean(dim=0), "eos": own[-1], "max": own.max(dim=0).values}[policy.pooling])
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    return normalize(torch.stack(rows), dim=-1), logprobs * rollouts.rationale_mask[:, 1:]


def plain_vectors(module: GRACE, batch: Sequence[Triplet], role: Role) -> Tensor:
    """Unit vectors of the texts of a role without rationales, with a graph."""
    prompts = module.renderer(texts_of(batch, role))
    return read_plainly(module.policy, without_rationales(prompts, module.policy.pad_id))[0]


def step_gradients(module: GRACE, batch: Sequence[Triplet]) -> tuple[Tensor, Tensor]:
    """The gradients of the score-function and of the pathwise part of the loss, weighted, of a first batch of one update.

    For grpo, the token mean, and whatever roles, truncation, reward, pooling and layer the module has.
    """
    h, k, algorithm = module.hparams, module.hparams["num_generations"], module.algorithm
    with torch.no_grad():
        rollout_batch = module.collector.collect(batch, 0)
    units, credit, tokens = {}, torch.zeros(()), 0
    for role, part in rollout_batch.roles.items():
        own, logprobs = read_plainly(module.policy, part.rollouts)
        units[role] = own.unflatten(0, (-1, k))
        rewards = role_reward(module.reward, rollout_batch.embeddings, role)(part.embeddings)
        finished = part.rollouts.finished.view(-1, k)
        floor = truncated_reward(rewards, finished, algorithm.truncation, algorithm.truncation_size)
        keep = finished if algorithm.truncation == "mask" else torch.ones_like(finished)
        advantages = grpo(torch.where(finished | floor.isnan(), rewards, floor), keep).flatten().unsqueeze(1)
        credit = credit + (advantages * logprobs * keep.flatten().unsqueeze(1)).sum()
        tokens += int((part.rollouts.rationale_lengths * keep.flatten()).sum())
    ones = {role: unit[:, 0] for role, unit in units.items()}
    if rollout_batch.context is not None:
        names = rollout_batch.context_roles
        sizes = [len(batch) * (len(batch[0].negatives) if role == "negative" else 1) for role in names]
        ones |= dict(zip(names, read_plainly(module.policy, rollout_batch.context)[0].split(sizes), strict=True))
    negative = ones["negative"].unflatten(0, (len(batch), -1)) if batch[0].negatives else rollout_batch.embeddings.negative
    e = Embeddings(ones["query"], units["positive"], negative)
    e = replace(e, **{role: getattr(e, role).detach() for role in ROLES if role not in h["pathwise_roles"]})
    parameters, found = trained(module.policy), []
    pathwise = (module.pathwise_reward or module.reward)(e).total.mean() if h["pathwise_weight"] else 0.0 * e.positive.sum()
    for part, weight in ((credit / max(tokens, 1), h["score_function_weight"]), (pathwise, h["pathwise_weight"])):
        gradients = torch.autograd.grad(-weight * part, parameters, retain_graph=True, allow_unused=True)
        found.append(flat(parameters, gradients))
    return found[0], found[1]
