"""Rationales of the same held-out texts over training, with their rewards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback, embed_triplets, fixed_triplets, is_due, sample, undisturbed, unit_vectors
from src.modules.encoder.card import fenced
from src.modules.grace import GRACE
from src.modules.objectives.roles import texts_of
from src.modules.types import Rollouts
from src.records import Triplet
from src.utils.atomic import write_atomic
from src.utils.tracking import log_table, log_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rationale:
    """A rationale about one text.

    Attributes:
        text: of the user's turn.
        rationale: as decoded, control tokens included.
        length: tokens.
        finished: whether it ended before the length limit.
        rewards: reward terms before weighting, and their weighted `total`; empty where there are none.
    """

    text: str
    rationale: str
    length: int
    finished: bool
    rewards: dict[str, float] = field(default_factory=dict)


class RationaleTable(MonitoringCallback[GRACE]):
    """Logs rationales/step_<n>.json (step, text, rationale, length, finished, reward terms) and, at the end, a page of before and after.

    Args:
        path: file of the page (Markdown), besides MLflow.
        texts: how many held-out documents; a single one has no rewards, which compare it with the others.
        every_n_rollout_batches: how often; 0 for the start and the end only.
        temperature, seed: of the sampling; temperature 0 is greedy.
    """

    applies_to = GRACE

    def __init__(self, path: str, texts: int = 8, every_n_rollout_batches: int = 20, temperature: float = 0.0, seed: int = 0) -> None:
        self.path, self.texts, self.every = Path(path), texts, every_n_rollout_batches
        self.temperature, self.seed = temperature, seed
        self.before: list[Rationale] = []
        self.after: list[Rationale] = []
        self._triplets: list[Triplet] = []
        self._from_start = True  # False once the texts are others than those of the start
        self._written_at = -1

    def at_start(self, trainer: L.Trainer, module: GRACE) -> None:
        self._triplets = fixed_triplets(trainer, self.texts)
        if len(self._triplets) == 1:
            log.warning("one record is held out: its rationales are logged without reward terms, which compare texts of a batch")
        if self._from_start and not self.before:
            self.before = self.write(trainer, module)
        elif [row.text for row in self.before] != texts_of(self._triplets, "positive"):
            log.warning("the held-out texts are not those of the start of this run: there will be no page of rationales before and after")
            self.before, self._from_start = [], False

    def after_batch(self, trainer: L.Trainer, module: GRACE) -> None:
        if is_due(module, self.every):
            self.after = self.write(trainer, module)

    def at_end(self, trainer: L.Trainer, module: GRACE) -> None:
        if self._written_at != module.rollout_batches:
            self.after = self.write(trainer, module)
        if trainer.is_global_zero and self.before and self.after:
            page = before_and_after(self.before, self.after, module.rollout_batches)
            write_atomic(self.path, page)
            log_text(trainer, page, f"rationales/{self.path.name}")

    def write(self, trainer: L.Trainer, module: GRACE) -> list[Rationale]:
        """Samples and logs one table."""
        step = self._written_at = module.rollout_batches
        rows = sample_rationales(module, self._triplets, self.temperature, self.seed)
        columns = {name: [getattr(row, name) for row in rows] for name in ("text", "rationale", "length", "finished")}
        rewards = {name: [row.rewards[name] for row in rows] for name in rows[0].rewards}
        log_table(trainer, {"step": [step] * len(rows), **columns, **rewards}, f"rationales/step_{step}.json")
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"before": [vars(row) for row in self.before], "from_start": self._from_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # earlier checkpoints say `earned`
        rows = [{"rewards" if name == "earned" else name: value for name, value in row.items()} for row in state_dict["before"]]
        self.before = [Rationale(**row) for row in rows]
        self._from_start = state_dict["from_start"]


def sample_rationales(module: GRACE, triplets: Sequence[Triplet], temperature: float, seed: int = 0) -> list[Rationale]:
    """Samples a rationale of each positive, and computes its reward as one more rollout of a group that is sampled as in training.

    The triplets are the batch in which rewards compare texts; a single one has no rewards.
    """
    texts = texts_of(triplets, "positive")
    with undisturbed(module):
        rollouts = sample(module, texts, temperature, seed)
        rewards = _rewards(module, triplets, rollouts, seed) if len(triplets) > 1 else [{}]
    decoded = [str(module.policy.tokenizer.decode(ids, skip_special_tokens=False)) for ids in rollouts.rationales()]
    rows = zip(texts, decoded, rollouts.rationale_lengths.tolist(), rollouts.finished.tolist(), rewards, strict=True)
    return [Rationale(*row) for row in rows]


def _rewards(module: GRACE, triplets: Sequence[Triplet], rollouts: Rollouts, seed: int) -> list[dict[str, float]]:
    batch = embed_triplets(module, triplets, module.hparams["num_generations"], seed)
    together = torch.cat([batch.positive, unit_vectors(module, rollouts).unsqueeze(1)], dim=1)
    reward = module.reward(replace(batch, positive=together))
    columns = {**reward.terms, "total": reward.total}
    return [{name: float(values[i, -1]) for name, values in columns.items()} for i in range(len(triplets))]


def before_and_after(before: list[Rationale], after: list[Rationale], steps: int) -> str:
    """Returns Markdown: each text with its rationale at the start and after `steps` rollout batches."""
    lines = [f"# Rationales before training and after {steps} rollout batches", ""]
    for i, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        lines += [f"## {i}", "", fenced(old.text), ""]
        for title, row in (("before", old), ("after", new)):
            end = "" if row.finished else ", cut at the limit"
            lines += [f"**{title}** ({row.length} tokens{end}):", "", fenced(row.rationale), ""]
    return "\n".join(lines)
