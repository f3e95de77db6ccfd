"""How alike a query and its document are beside texts that do not belong together, before training and after."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback, as_grace
from src.callbacks.probe import embed_sides, fixed_triplets, undisturbed
from src.modules.grace import GRACE
from src.modules.policy_module import PolicyModule
from src.modules.types import Embeddings
from src.utils.plots import Similarities, similarities_figure
from src.utils.tracking import log_figure, log_table

POSITIVE, HARD_NEGATIVE, IN_BATCH = "positive", "hard negative", "unrelated"
"""Query and its document; query and its hard negatives; query and the documents of the other records."""


def similarities(embeddings: Embeddings) -> Similarities:
    """Cosines of queries to documents by kind of pair; kinds without a pair are left out."""
    query, positive = embeddings.query, embeddings.positive[:, 0]
    cross = query @ positive.T  # [B, B]
    kinds = {
        POSITIVE: cross.diagonal(),
        HARD_NEGATIVE: torch.einsum("id,imd->im", query, embeddings.negative).flatten(),
        IN_BATCH: cross[~torch.eye(len(query), dtype=torch.bool, device=cross.device)],
    }
    return {kind: values.tolist() for kind, values in kinds.items() if len(values)}


class SimilarityHistograms(MonitoringCallback):
    """Logs similarities/step_<n>.json (kind, cosine) at the start and at the end, and draws their histograms.

    Rationales are sampled at the temperatures of training: where anchor and document are one text, greedy ones would not differ.

    Args:
        figure_path: where the figure goes (PNG), besides MLflow; null draws none.
        records: how many of the datamodule's validation records.
        seed: of the sampling.
    """

    def __init__(self, figure_path: str | None = None, records: int = 64, seed: int = 0) -> None:
        self.figure_path = Path(figure_path) if figure_path else None
        self.records, self.seed = records, seed
        self.before: Similarities = {}

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not self.before:  # else resumed: the checkpoint brought them
            self.before = self.measure(trainer, as_grace(module))

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        after = self.measure(trainer, as_grace(module))
        if self.figure_path is None or not trainer.is_global_zero:
            return
        figure = similarities_figure({"before training": self.before, f"after {module.rollout_batches} rollout batches": after})
        self.figure_path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.figure_path)
        log_figure(trainer, figure, f"figures/{self.figure_path.name}")

    def measure(self, trainer: L.Trainer, module: GRACE) -> Similarities:
        """Measures and logs them."""
        with undisturbed(module):
            found = similarities(embed_sides(module, fixed_triplets(trainer, self.records), n=1, seed=self.seed))
        rows = [(kind, value) for kind, values in found.items() for value in values]
        log_table(
            trainer,
            {"kind": [kind for kind, _ in rows], "cosine": [value for _, value in rows]},
            f"similarities/step_{module.rollout_batches}.json",
        )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict["before"])
