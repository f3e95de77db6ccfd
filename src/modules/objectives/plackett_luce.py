"""A Plackett-Luce ranking as a reward: how well the query's ranking of the batch's documents places the rationale's document."""

import torch
from torch import Tensor, nn

from src.modules.objectives.rewards import combine, consistency, to_queries
from src.modules.types import Embeddings, Reward


class PlackettLuce(nn.Module):
    """Expected nDCG of rankings that are sampled from similarities (Neural PG-RANK, Gao et al., arXiv 2310.04407).

    Query i ranks rollout k of its document among its hard negatives and the other documents of the batch (the mean embedding of their
    rollouts) by a Plackett-Luce model: the next document is drawn by softmax(similarity / tau) over those that are left. The own document
    alone is relevant, so the nDCG of a ranking that has it at place r is 1 / log2(1 + r), and 0 beyond `depth`. The paper's policy is the
    retriever; here the number is the reward of a rationale, and the paper's gradient the pathwise part.

    ndcg = mean of it over the sampled rankings; total = ndcg + lambda1 consistency.

    The gradient of `ndcg` in the embeddings is the paper's: sum over rankings of (its nDCG less the mean of the others') times the gradient
    of its log-probability, over their number. Places behind the document or beyond `depth` have no part in it, as they change nothing.

    The rollouts of an instance, and all calls of one batch, share their random numbers; `batches` counts the batches, so that the next one
    draws others, on all ranks the same, and after a checkpoint too.

    Args:
        rankings: how many are sampled, at least 2.
        depth: of nDCG.
        temperature: tau.
        consistency_weight: lambda1.
        seed: of the rankings.

    Raises:
        ValueError: a number out of range; no document to rank the own one against.
    """

    batches: Tensor

    def __init__(
        self, *, rankings: int = 32, depth: int = 10, temperature: float = 0.05, consistency_weight: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (("rankings", rankings, 2), ("depth", depth, 1)):
            if value < least:
                raise ValueError(f"reward.{name}={value}: it must be at least {least}")
        self.rankings, self.depth, self.temperature, self.seed = rankings, depth, temperature, seed
        self.consistency_weight = consistency_weight
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, e: Embeddings) -> Reward:
        similarity, own = to_queries(e)  # [B, K, B], [B, K]
        rivals = similarity.mean(dim=1).T.masked_fill(~e.others, -torch.inf)  # [B, B]: of query i to document j
        negatives = torch.einsum("id,imd->im", e.query, e.negative)
        against = torch.cat([rivals, negatives], dim=1) / self.temperature
        if not against.isfinite().any(dim=1).all():
            raise ValueError(
                "reward.plackett_luce ranks documents against each other, and one has no rival: raise datamodule.batch_size, "
                "or use records with negatives"
            )
        scores = torch.cat([own.unsqueeze(2) / self.temperature, against.unsqueeze(1).expand(-1, own.shape[1], -1)], dim=2)
        # a number and not minus infinity: the gradient of a logsumexp of nothing but that is nan
        terms = {"ndcg": self._ndcg(scores.clamp(min=-1e9)), "consistency": consistency(e.positive)}
        return combine(terms, {"ndcg": 1.0, "consistency": self.consistency_weight})

    def _ndcg(self, scores: Tensor) -> Tensor:
        """Returns [B, K] from scores [B, K, C], of which the first is the own document's."""
        generator = torch.Generator().manual_seed(hash((self.seed, int(self.batches))) % 2**31)
        uniform = torch.rand(len(scores), 1, self.rankings, scores.shape[2], generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp(min=1e-12).log()).log().to(scores)  # the order of score plus Gumbel noise is Plackett-Luce's
        drawn = scores.detach().unsqueeze(2) + gumbel  # [B, K, S, C]
        place = 1 + (drawn[..., 1:] > drawn[..., :1]).sum(dim=3)  # [B, K, S]
        gains = (place <= self.depth) / torch.log2(1.0 + place)
        if not scores.requires_grad:
            return gains.mean(dim=2)
        others = (gains.sum(dim=2, keepdim=True) - gains) / (self.rankings - 1)
        logprobs = _logprob_of_prefix(
            scores.unsqueeze(2).expand_as(drawn), drawn.argsort(dim=3, descending=True), place.clamp(max=self.depth)
        )
        return gains.mean(dim=2) + ((gains - others) * (logprobs - logprobs.detach())).mean(dim=2)

    def remember(self, e: Embeddings) -> None:
        """Counts a batch."""
        self.batches = self.batches + 1


def _logprob_of_prefix(scores: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Returns the log-probability of the first places of rankings under Plackett-Luce.

    Args:
        scores: [..., C] of the documents.
        order: [..., C] int64, documents from first to last.
        places: [...] int64, how many of them count.
    """
    ranked = scores.gather(-1, order)
    left = ranked.flip(-1).logcumsumexp(dim=-1).flip(-1)  # over those that are not placed yet
    counts = torch.arange(order.shape[-1], device=order.device) < places.unsqueeze(-1)
    return ((ranked - left) * counts).sum(dim=-1)
