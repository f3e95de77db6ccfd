"""Similarities of queries to their documents and to others, before training and after."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback, embed_triplets, fixed_triplets, save_figure, undisturbed
from src.modules.grace import GRACE
from src.modules.types import Embeddings
from src.utils.plots import Similarities, similarities_figure
from src.utils.tracking import log_table


class SimilarityHistograms(MonitoringCallback[GRACE]):
    """Logs similarities/step_<n>.json (kind, cosine) at the start and at the end, and draws their histograms.

    Rationales are sampled at training's temperatures: where query and document are one text, greedy ones would be the same.

    Args:
        figure_path: file of the figure (PNG), besides MLflow; None draws none.
        records: how many held-out records.
        seed: of the sampling.
    """

    applies_to = GRACE

    def __init__(self, figure_path: str | None = None, records: int = 64, seed: int = 0) -> None:
        self.figure_path = Path(figure_path) if figure_path else None
        self.records, self.seed = records, seed
        self.before: Similarities = {}

    def at_start(self, trainer: L.Trainer, module: GRACE) -> None:
        if not self.before:  # else a resumed run has those of its start
            self.before = self.measure(trainer, module)

    def at_end(self, trainer: L.Trainer, module: GRACE) -> None:
        after = self.measure(trainer, module)
        if self.figure_path is not None and trainer.is_global_zero:
            panels = {"before training": self.before, f"after {module.rollout_batches} rollout batches": after}
            save_figure(trainer, similarities_figure(panels), self.figure_path)

    def measure(self, trainer: L.Trainer, module: GRACE) -> Similarities:
        """Returns the similarities of the current policy, and logs them."""
        with undisturbed(module):
            found = similarities(embed_triplets(module, fixed_triplets(trainer, self.records), n=1, seed=self.seed))
        rows = [(kind, value) for kind, values in found.items() for value in values]
        columns: dict[str, list[Any]] = {"kind": [kind for kind, _ in rows], "cosine": [value for _, value in rows]}
        log_table(trainer, columns, f"similarities/step_{module.rollout_batches}.json")
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict["before"])


def similarities(embeddings: Embeddings) -> Similarities:
    """Returns the cosines of queries to their documents, to their hard negatives and to the documents of other records that share no text.

    A kind without pairs is left out.
    """
    query, positive = embeddings.query, embeddings.positive[:, 0]
    cross = query @ positive.T  # [B, B]
    kinds = {
        "positive": cross.diagonal(),
        "hard negative": torch.einsum("id,imd->im", query, embeddings.negative).flatten(),
        "unrelated": cross[embeddings.others],
    }
    return {kind: values.tolist() for kind, values in kinds.items() if len(values)}
