"""What one batch of contrastive learning did."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.objectives.info_nce import cosines
from src.modules.objectives.pairs import Pairs
from src.modules.training.batch_report import speed


@dataclass(frozen=True)
class ContrastiveReport:
    """One batch of B instances.

    Attributes:
        accuracy: share of the queries whose own document is the most similar of all that it is told apart from.
        positive_similarity: mean cosine of queries and their documents.
        unrelated_similarity: mean cosine of different documents of the batch.
        update: loss (InfoNCE, nats), grad_norm (before clipping), and updates, which is 1.
        seconds: of the phase update.
        update_tokens: tokens of all texts, padding not counted.
        instance_ids: B record ids.
        rollout_tokens: 0, as no rationale is written.
    """

    accuracy: float
    positive_similarity: float
    unrelated_similarity: float
    update: dict[str, float]
    seconds: dict[str, float]
    update_tokens: int
    instance_ids: list[str]
    rollout_tokens: int = 0

    def headline(self) -> dict[str, str]:
        """InfoNCE, and tokens a second."""
        return {"loss": f"{self.update['loss']:.3f}", "tokens/s": speed(self.update_tokens, self.seconds.get("update"))}


def contrastive_report(
    embeddings: Tensor, pairs: Pairs, update: dict[str, float], seconds: dict[str, float], tokens: int, instance_ids: list[str]
) -> ContrastiveReport:
    """`embeddings`, [B + N, D], are of queries and documents."""
    queries, documents = embeddings.split([len(pairs.queries), len(pairs.documents)])
    similarity = cosines(queries, documents, pairs.left_out.to(embeddings.device)).cpu()
    among = cosines(documents, documents).cpu()
    n = len(documents)
    return ContrastiveReport(
        accuracy=float((similarity.argmax(dim=1) == pairs.own).float().mean()),
        positive_similarity=float(similarity[torch.arange(len(queries)), pairs.own].mean()),
        unrelated_similarity=float((among.sum() - among.trace()) / (n * (n - 1))),
        update=update,
        seconds=seconds,
        update_tokens=tokens,
        instance_ids=instance_ids,
    )
