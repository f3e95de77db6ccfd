"""The rationales of the same texts, again and again, so that their change can be read, and what it earned."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback, as_grace
from src.callbacks.probe import embed_sides, fixed_triplets, is_due, sample, undisturbed, unit_vectors
from src.modules.grace import GRACE
from src.modules.objectives.roles import texts_of
from src.modules.policy_module import PolicyModule
from src.modules.types import Rollouts
from src.records import Triplet
from src.utils.tracking import log_table, log_text, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rationale:
    """What a policy wrote about one text.

    Attributes:
        text: of the user's turn.
        rationale: as decoded, control tokens included (a rationale that never ends shows none).
        length: tokens.
        finished: whether it ended before the length limit.
        earned: reward terms, before weighting, and their weighted total under `total`.
    """

    text: str
    rationale: str
    length: int
    finished: bool
    earned: dict[str, float] = field(default_factory=dict)


def write_rationales(module: GRACE, triplets: Sequence[Triplet], temperature: float, seed: int = 0) -> list[Rationale]:
    """The policy's rationales for the positives, with what each would earn as one more rollout of its group.

    The group is sampled as in training, and the triplets are its batch; a single one earns nothing that could be said.
    """
    texts = texts_of(triplets, "positive")
    with undisturbed(module):
        rollouts = sample(module, texts, temperature, seed)
        earned = _earned(module, triplets, rollouts, seed) if len(triplets) > 1 else [{}]
    decoded = [str(module.policy.tokenizer.decode(ids, skip_special_tokens=False)) for ids in rollouts.rationales()]
    rows = zip(texts, decoded, rollouts.rationale_lengths.tolist(), rollouts.finished.tolist(), earned, strict=True)
    return [Rationale(*row) for row in rows]


def _earned(module: GRACE, triplets: Sequence[Triplet], rollouts: Rollouts, seed: int) -> list[dict[str, float]]:
    others = embed_sides(module, triplets, module.hparams["num_generations"], seed)
    together = torch.cat([others.positive, unit_vectors(module, rollouts).unsqueeze(1)], dim=1)
    reward = module.reward(replace(others, positive=together))
    columns = {**reward.terms, "total": reward.total}
    return [{name: float(values[i, -1]) for name, values in columns.items()} for i in range(len(triplets))]


def before_and_after(before: list[Rationale], after: list[Rationale], steps: int) -> str:
    """Markdown: each text with its rationale at the start and after `steps` rollout batches."""
    lines = [f"# Rationales before training and after {steps} rollout batches", ""]
    for i, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        lines += [f"## {i}", "", *_fenced(old.text), ""]
        for title, r in (("before", old), ("after", new)):
            end = "" if r.finished else ", cut at the limit"
            lines += [f"**{title}** ({r.length} tokens{end}):", "", *_fenced(r.rationale), ""]
    return "\n".join(lines)


def _fenced(text: str) -> list[str]:
    """Lines of Markdown that show a text as it is: its own markup, and the tags in it, are characters."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text: nothing closes it
    return [f"{fence}text", text.strip(), fence]


class RationaleTable(MonitoringCallback):
    """Logs rationales/step_<n>.json (step, text, rationale, length, finished, reward terms) and, at the end, a list of before
    and after.

    Args:
        path: where the list goes (Markdown), besides MLflow.
        texts: how many of the datamodule's validation documents. A single one earns nothing that could be said: rewards
            compare it with the others.
        every_n_rollout_batches: how often; 0 for the start and the end only.
        temperature, seed: of the sampling; 0 is greedy.
    """

    def __init__(self, path: str, texts: int = 8, every_n_rollout_batches: int = 20, temperature: float = 0.0, seed: int = 0) -> None:
        self.path, self.texts, self.every = Path(path), texts, every_n_rollout_batches
        self.temperature, self.seed = temperature, seed
        self.before: list[Rationale] = []
        self.after: list[Rationale] = []
        self._triplets: list[Triplet] = []
        self._from_start = True  # whether the starting policy has been seen with these texts, or can be
        self._written_at = -1

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        self._triplets = fixed_triplets(trainer, self.texts)
        if len(self._triplets) == 1:
            log.warning("one record is held out: its rationales are logged without reward terms, which compare texts of a batch")
        if self._from_start and not self.before:  # else resumed: the checkpoint brought what the starting policy wrote
            self.before = self.write(trainer, as_grace(module))
        elif [row.text for row in self.before] != texts_of(self._triplets, "positive"):
            log.warning("the watched texts are not those of before the stop: there will be no list of rationales before and after")
            self.before, self._from_start = [], False

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if is_due(module, self.every):
            self.after = self.write(trainer, as_grace(module))

    def at_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if self._written_at != module.rollout_batches:
            self.after = self.write(trainer, as_grace(module))
        if trainer.is_global_zero and self.before and self.after:
            markdown = before_and_after(self.before, self.after, module.rollout_batches)
            write_text(self.path, markdown)
            log_text(trainer, markdown, f"rationales/{self.path.name}")

    def write(self, trainer: L.Trainer, module: GRACE) -> list[Rationale]:
        """Samples and logs one table."""
        step = self._written_at = module.rollout_batches
        rows = write_rationales(module, self._triplets, self.temperature, self.seed)
        columns = {name: [getattr(row, name) for row in rows] for name in ("text", "rationale", "length", "finished")}
        earned = {name: [row.earned[name] for row in rows] for name in rows[0].earned}
        log_table(trainer, {"step": [step] * len(rows), **columns, **earned}, f"rationales/step_{step}.json")
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"before": [vars(row) for row in self.before], "from_start": self._from_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = [Rationale(**row) for row in state_dict["before"]]
        self._from_start = state_dict["from_start"]
