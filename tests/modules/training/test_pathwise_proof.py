"""The estimator's expectation is the exact derivative of an objective: both are computed over all rationales there are.

A vocabulary of EOS and one other token with at most three tokens has four rationales, so the K rollouts of B positives have
4^(BK) joint draws. Queries and negatives have one rationale each, always the same. GRACE computes its gradient of each joint draw
(`training_step`, with the draw in the engine's place and `take_step` handing the gradient out), and their mean by probability is the
expectation. What it must be is written a second time, by plain calls of transformers in float64 and one call of autograd:

    F = sum over joint draws y of mean over (i, k) of pi(y[i, k]) * prod over the other rollouts of sg(pi) * R[i, k](h)

sg holds a number constant. So this is the objective of which the two terms together are the derivative:

- the embeddings h of all roles are differentiated, in every reward that they are part of;
- the sampling is differentiated for a rollout's own reward: what it does to the rewards of others (consistency, other instances'
  in-batch terms), which no policy gradient with a reward by rollout credits it with, is held, and so is the sampling of queries and
  negatives, unless they are learned from. Where a reward depends on no other rollout, F is the plain mean reward;
- on the true scale: log-probabilities summed over a rationale's tokens (aggregation `constant` with one token), the mean over rollouts.
  Another aggregation scales the score-function term alone.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations_with_replacement, product
from math import factorial, prod
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from src.modules.grace import GRACE
from src.modules.objectives.advantages import rloo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import constant, reinforce
from src.modules.objectives.rewards import document, listwise, paper
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.types import Rollouts, join
from src.records import Triplet
from tests.builders import flat, loader, off, quiet_trainer, small_tokenizer
from tests.oracles import document_oracle, listwise_oracle, paper_oracle

B, K, EOS = 2, 2, 0
BATCH = [Triplet(f"f:{i}", f"query {i}", f"positive {i}", (f"negative {i}",)) for i in range(B)]
TEXTS = {  # ids of the prompt, of which the first is no text, and the one rationale of what is not a positive
    "query 0": ([1, 0, 1], [0]),
    "query 1": ([1, 1, 1, 0], [1, 0]),
    "positive 0": ([1, 0, 0, 1], []),
    "positive 1": ([1, 1, 0], []),
    "negative 0": ([1, 0, 0], [1, 1]),
    "negative 1": ([1, 1, 1], [0]),
}
Draw = dict[str, tuple[int, ...]]
"""By text the numbers of its K rationales."""
RewardOracle = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Unit vectors [B, D], [B, K, D], [B, M, D] to rewards [B, K]."""

REWARDS: dict[str, tuple[Any, RewardOracle]] = {
    "paper": (paper, lambda q, p, n: paper_oracle(q, p, n, 0.2, 0.2, 0.1)),
    "document": (document, lambda q, p, n: document_oracle(q, p, n, 0.2, 0.2, 0.1, "mean")),
    "listwise": (listwise, lambda q, p, n: listwise_oracle(q, p, n, 1.0, 1.0, 0.0, 0.05, "both")),
    "document without consistency": (
        partial(document, consistency_weight=0.0),
        lambda q, p, n: document_oracle(q, p, n, 0.0, 0.2, 0.1, "mean"),
    ),
    "listwise centred by document": (
        partial(listwise, centre="document"),
        lambda q, p, n: listwise_oracle(q, p, n, 1.0, 1.0, 0.0, 0.05, "document"),
    ),
    "listwise not centred": (partial(listwise, centre="none"), lambda q, p, n: listwise_oracle(q, p, n, 1.0, 1.0, 0.0, 0.05, "none")),
}


def rationales_of(ids: int, longest: int) -> list[list[int]]:
    """All that can be written with so many ids, EOS included, in at most so many tokens."""
    words = range(1, ids)
    ended = [[*words_before, EOS] for n in range(longest) for words_before in product(words, repeat=n)]
    return ended + [list(cut) for cut in product(words, repeat=longest)]


def raw(rewards: Tensor, keep: Tensor) -> Tensor:
    """No baseline."""
    return rewards


# ---- the estimator


def render(texts: Sequence[str]) -> Prompts:
    """Prompts of given ids."""
    ids = tuple(torch.tensor(TEXTS[text][0]) for text in texts)
    return Prompts(ids, torch.ones(len(ids), dtype=torch.long), torch.tensor([len(row) - 1 for row in ids]))


class Prescribed:
    """Returns the rationales of a draw, and of a text that is asked for one rationale the one that it always has."""

    exact = True

    def __init__(self, rationales: list[list[int]]) -> None:
        self.rationales, self.max_new_tokens = rationales, max(map(len, rationales))
        self.draw: Draw = {}

    def generate(self, policy: Policy, prompts: Prompts, n: int, temperature: float, seed: Any, prefixes: bool = False) -> Rollouts:
        texts = {tuple(ids): text for text, (ids, _) in TEXTS.items()}
        names = [texts[tuple(ids.tolist())] for ids in prompts.ids]
        written = [ids for name in names for ids in ([TEXTS[name][1]] if n == 1 else [self.rationales[y] for y in self.draw[name]])]
        finished = torch.tensor([ids[-1] == EOS for ids in written])
        return join(prompts.repeat(n), [torch.tensor(ids) for ids in written], finished, policy.pad_id)


class Enumerated(GRACE):
    """Adds up the gradients of draws, weighted by their probabilities, in place of steps."""

    draws: list[tuple[Draw, float]]
    expected: list[Tensor]

    def training_step(self, batch: list[Triplet], batch_idx: int) -> None:
        self.engine.draw, self.probability = self.draws[batch_idx]
        super().training_step(batch, batch_idx)

    def take_step(self, instance_ids: Sequence[str]) -> float:
        for total, parameter in zip(self.expected, self.policy.parameters(), strict=True):
            if parameter.grad is not None:
                total -= self.probability * parameter.grad.double()  # a loss is minus an objective
            parameter.grad = None
        return 0.0


def tiny_policy(ids: int, layers: int = 1, seed: int = 14) -> Policy:
    """Random layers of 8, an output layer of its own; under this seed no rationale is rare."""
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=ids, initializer_range=0.5, bos_token_id=None, eos_token_id=EOS, max_position_embeddings=64, **size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    tokenizer = small_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token  # id 0
    return Policy(model, tokenizer)


def expectation(written: "Written", reward: Any, **settings: Any) -> Tensor:
    """The mean of GRACE's gradient over all draws, by their probabilities, as one vector."""
    policy, draws = written.policy, draws_of(written, queries="query" in settings.get("also_learn_from", ()))
    algorithm = Algorithm(settings.pop("advantage", raw), reinforce, partial(constant, tokens=1), truncation="none")
    module = Enumerated(
        *(policy, Prescribed(written.rationales), reward, algorithm, "Name the terms.", 40),
        **{"num_generations": K, "gradient_parts_every_n_rollout_batches": 0, **settings},
    )
    module.renderer = render
    module.draws, module.expected = draws, [torch.zeros_like(p, dtype=torch.float64) for p in policy.parameters()]
    quiet_trainer().fit(module, loader([BATCH] * len(draws)))
    assert module.rollout_batches == len(draws)
    return torch.cat([gradient.flatten() for gradient in module.expected])


def draws_of(written: "Written", queries: bool) -> list[tuple[Draw, float]]:
    """All joint draws of the positives' rollouts with their probabilities, and of the queries' where they are learned from.

    Rollouts of a positive are exchangeable: pairs without order do, with the number of orders as a factor. Of a query's, rewards
    of other rollouts depend on the first alone, so these stand in every order.
    """
    count = range(len(written.rationales))
    pairs = {pair: factorial(K) // prod(factorial(pair.count(y)) for y in set(pair)) for pair in combinations_with_replacement(count, K)}
    texts = {t.positive: pairs for t in BATCH} | ({t.query: dict.fromkeys(product(count, repeat=K), 1) for t in BATCH} if queries else {})
    draws = []
    for chosen in product(*texts.values()):
        draw = dict(zip(texts, chosen, strict=True))
        orders = prod(texts[text][pair] for text, pair in draw.items())
        logprob = sum(float(written.logprob[text, y].detach()) for text, pair in draw.items() for y in pair)
        draws.append((draw, orders * float(torch.tensor(logprob).exp())))
    assert sum(probability for _, probability in draws) == pytest.approx(1.0, abs=1e-6)
    return draws


# ---- the objective


class Written:
    """Unit vectors and log-probabilities of every text with every rationale, by plain calls of transformers in float64."""

    def __init__(self, policy: Policy, rationales: list[list[int]], queries: bool = False) -> None:
        self.policy, self.model, self.rationales = policy, copy.deepcopy(policy.model).double(), rationales
        self.h: dict[Any, Tensor] = {}
        self.logprob: dict[Any, Tensor] = {}
        for text, (prompt, own) in TEXTS.items():
            if text.startswith("positive") or (queries and text.startswith("query")):
                for y, ids in enumerate(rationales):
                    self.h[text, y], self.logprob[text, y] = self._read(prompt, ids)
            else:
                self.h[text], _ = self._read(prompt, own)

    def _read(self, prompt: list[int], rationale: list[int]) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=torch.tensor([prompt + rationale]), output_hidden_states=True)
        states, logits = output.hidden_states[-1][0], output.logits[0]
        mean = sum(states[t] for t in range(1, len(states))) / (len(states) - 1)  # all but the first, which is no text
        logprobs = [logits[len(prompt) + t - 1].log_softmax(dim=-1)[token] for t, token in enumerate(rationale)]
        return mean / mean.norm(), sum(logprobs)

    def gradient(self, value: Tensor) -> Tensor:
        parameters = list(self.model.parameters())
        return flat(parameters, torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))

    def rewards(self, oracle: RewardOracle, draw: Sequence[Sequence[int]], queries: Sequence[int] | None = None) -> Tensor:
        """[B, K] of the positives' draw, with the queries' rationales of these numbers."""
        numbers = enumerate(BATCH)
        q = torch.stack([self.h[t.query] if queries is None else self.h[t.query, queries[i]] for i, t in numbers])
        p = torch.stack([torch.stack([self.h[t.positive, y] for y in ys]) for t, ys in zip(BATCH, draw, strict=True)])
        n = torch.stack([torch.stack([self.h[text] for text in t.negatives]) for t in BATCH])
        return oracle(q, p, n)

    def joint(self) -> list[tuple[tuple[int, ...], ...]]:
        """Every draw of the positives' rollouts, in every order."""
        flat = product(range(len(self.rationales)), repeat=B * K)
        return [tuple(ys[i * K : (i + 1) * K] for i in range(B)) for ys in flat]

    def probabilities(self, draw: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """[B][K]."""
        return [[self.logprob[t.positive, y].exp() for y in ys] for t, ys in zip(BATCH, draw, strict=True)]

    def own_credit(self, oracle: RewardOracle) -> Tensor:
        """F."""
        total = torch.zeros((), dtype=torch.float64)
        for draw in self.joint():
            pi, r = self.probabilities(draw), self.rewards(oracle, draw)
            for i, k in product(range(B), range(K)):
                others = prod(float(pi[j][m].detach()) for j, m in product(range(B), range(K)) if (j, m) != (i, k))
                total = total + pi[i][k] * others * r[i, k] / (B * K)
        return total

    def mean_reward(self, oracle: RewardOracle) -> Tensor:
        """The plain objective: every probability and every embedding is differentiated."""
        terms = [prod(p for row in self.probabilities(draw) for p in row) * self.rewards(oracle, draw).mean() for draw in self.joint()]
        return torch.stack(terms).sum()

    def apart(self, of_sampling: RewardOracle, of_embedding: RewardOracle) -> Tensor:
        """F whose sampling is differentiated for one reward and whose embeddings for another."""
        total = torch.zeros((), dtype=torch.float64)
        for draw in self.joint():
            pi = self.probabilities(draw)
            whole = prod(float(p.detach()) for row in pi for p in row)
            credit = self.rewards(of_sampling, draw).detach() * torch.stack([torch.stack(row).log() for row in pi])
            total = total + whole * (credit + self.rewards(of_embedding, draw)).mean()
        return total


FOUR = rationales_of(ids=2, longest=3)


@pytest.fixture(scope="module")
def four() -> Written:
    """Of at most three tokens."""
    return Written(tiny_policy(ids=2), FOUR)


@pytest.fixture(scope="module")
def three() -> Written:
    """Of at most two, for what is about another part of the settings."""
    return Written(tiny_policy(ids=2), rationales_of(ids=2, longest=2))


def test_all_rationales_are_there(four: Written) -> None:
    assert FOUR == [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    assert len(rationales_of(ids=3, longest=2)) == 7
    for triplet in BATCH:
        own = [float(four.logprob[triplet.positive, y].detach().exp()) for y in range(4)]
        assert sum(own) == pytest.approx(1.0, abs=1e-12)
        assert min(own) > 0.05  # none that would not matter


@pytest.mark.parametrize("name", ["paper", "document", "listwise"])
def test_both_terms_are_the_exact_derivative(name: str, four: Written) -> None:
    reward, oracle = REWARDS[name]
    exact = four.gradient(four.own_credit(oracle))
    both = expectation(four, reward, pathwise_weight=1.0)
    published = expectation(four, reward)
    assert off(both, exact) < 1e-5
    assert off(published, exact) > 0.3
    assert off(both - published, exact) > 0.3  # the pathwise term alone


def test_pathwise_term_holds_the_sampling(three: Written) -> None:
    reward, oracle = REWARDS["document"]
    held = three.gradient(three.apart(lambda *e: 0 * oracle(*e), oracle))
    ours = expectation(three, reward, score_function_weight=0.0, pathwise_weight=1.0)
    assert off(ours, held) < 1e-5
    assert off(ours, three.gradient(three.own_credit(oracle))) > 0.3


def test_uncoupled_reward_gives_the_mean_rewards_derivative(three: Written) -> None:
    reward, oracle = REWARDS["document without consistency"]
    exact = three.gradient(three.mean_reward(oracle))
    assert off(expectation(three, reward, pathwise_weight=1.0), exact) < 1e-5
    # with consistency a rollout also moves the reward of the group's other, which it has no credit for
    _, coupled = REWARDS["document"]
    whole, own = (three.gradient(objective(coupled)) for objective in (three.mean_reward, three.own_credit))
    assert off(own, whole) > 1e-3


@pytest.mark.parametrize(
    "name",
    ["document without consistency", "listwise centred by document", pytest.param("listwise not centred", marks=pytest.mark.slow)],
)
def test_leave_one_out_keeps_the_expectation(name: str, three: Written) -> None:
    """The baseline of a rollout is the mean reward of its group's others, and takes nothing away where that does not depend on it.

    Consistency makes it depend: see the next test. `centre=both` of listwise takes off means over the batch's rollouts, this one among
    them.
    """
    reward, oracle = REWARDS[name]
    exact = three.gradient(three.own_credit(oracle))
    assert off(expectation(three, reward, advantage=rloo, pathwise_weight=1.0), exact) < 1e-5


def test_leave_one_out_removes_consistency(three: Written) -> None:
    """Consistency couples a group's rewards: part of the baseline is what the rollout itself got.

    With K = 2 both rollouts have the same consistency, and the baseline removes all of it from the score-function term (with K
    rollouts 1 / (K - 1) of it). The pathwise term has no baseline, and keeps it.
    """
    (_, without), (reward, oracle) = REWARDS["document without consistency"], REWARDS["document"]
    ours = expectation(three, reward, advantage=rloo, pathwise_weight=1.0)
    assert off(ours, three.gradient(three.apart(without, oracle))) < 1e-5
    assert off(ours, three.gradient(three.own_credit(oracle))) > 1e-3


def test_another_pathwise_reward(three: Written) -> None:
    (reward, of_sampling), (other, of_embedding) = REWARDS["document"], REWARDS["listwise"]
    ours = expectation(three, reward, pathwise_weight=0.5, pathwise_reward=other)
    exact = three.gradient(three.apart(of_sampling, lambda *e: 0.5 * of_embedding(*e)))
    assert off(ours, exact) < 1e-5


def credit_of_queries_too(written: Written, oracle: RewardOracle, of_queries: float = 1.0) -> Tensor:
    """F, and the same for queries: the mean reward of a query's instance, with the sampling of that query differentiated."""
    total = torch.zeros((), dtype=torch.float64)
    for draw, queries in product(written.joint(), product(range(len(written.rationales)), repeat=B)):
        pi, r = written.probabilities(draw), written.rewards(oracle, draw, queries)
        own = [written.logprob[t.query, y].exp() for t, y in zip(BATCH, queries, strict=True)]
        whole = prod(float(p.detach()) for row in pi for p in row) * prod(float(p.detach()) for p in own)
        for i in range(B):
            for k in range(K):  # p / sg(p) is 1, and its derivative that of log p
                total = total + whole * pi[i][k] / pi[i][k].detach() * r[i, k] / (B * K)
            total = total + of_queries * whole * (own[i] / own[i].detach() - 1) * r[i].detach().mean() / B
    return total


@pytest.mark.parametrize("longest", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_learned_queries_have_their_credit(longest: int) -> None:
    """The algorithm's loss is a mean over the rollouts of all roles: with two roles of one size its weight on the true scale is 2."""
    written = Written(tiny_policy(ids=2), rationales_of(ids=2, longest=longest), queries=True)
    reward, oracle = REWARDS["listwise"]
    exact = written.gradient(credit_of_queries_too(written, oracle))
    ours = expectation(written, reward, score_function_weight=2.0, also_learn_from=["query"], pathwise_weight=1.0)
    assert off(ours, exact) < 1e-5
    assert off(ours, written.gradient(credit_of_queries_too(written, oracle, of_queries=0.0))) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "document", "listwise"])
def test_seven_rationales_have_the_exact_derivative(name: str) -> None:
    written = Written(tiny_policy(ids=3, layers=2), rationales_of(ids=3, longest=2))
    reward, oracle = REWARDS[name]
    ours = expectation(written, reward, pathwise_weight=1.0)
    assert off(ours, written.gradient(written.own_credit(oracle))) < 1e-5
