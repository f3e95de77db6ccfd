"""Rationales of the same held-out texts over training, with their rewards."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from src.callbacks.monitoring import MonitoringCallback, embed_triplets, fixed_triplets, is_due, undisturbed, unit_vectors
from src.modules.encoder.card import fenced
from src.modules.grace import GRACE
from src.modules.objectives.roles import texts_of
from src.modules.types import Embeddings, Rollouts
from src.records import Triplet
from src.utils.atomic import write_atomic
from src.utils.tracking import log_table, log_text

log = logging.getLogger(__name__)


_PIECES = ("pieces", "similarities")


@dataclass(frozen=True)
class Rationale:
    """A rationale about one text.

    Attributes:
        text: of the user's turn.
        rationale: as decoded, control tokens included.
        length: tokens.
        finished: whether it ended before the length limit.
        rewards: reward terms before weighting, and their weighted `total`; empty where there are none.
        pieces: the rationale cut at its tokens, those of one character together; empty where the engine gives no embeddings of prefixes.
        similarities: cosines to the text's query after the prompt, and after each piece.
    """

    text: str
    rationale: str
    length: int
    finished: bool
    rewards: dict[str, float] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)


class RationaleTable(MonitoringCallback[GRACE]):
    """Logs rationales/step_<n>.json (the fields of Rationale, a column for each reward term) and, at the end, a page of before and after.

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
        columns = {name: [getattr(row, name) for row in rows] for name in ("text", "rationale", "length", "finished", *_PIECES)}
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
    prompts = module.renderer(texts := texts_of(triplets, "positive"))
    with undisturbed(module):
        rollouts = module.engine.generate(module.policy, prompts, n=1, temperature=temperature, seed=seed, prefixes=True)
        batch = embed_triplets(module, triplets, module.hparams["num_generations"], seed)
        rewards = _rewards(module, batch, rollouts) if len(triplets) > 1 else [{}]
    ids, tokenizer = rollouts.rationales(), module.policy.tokenizer
    decoded = [str(tokenizer.decode(row, skip_special_tokens=False)) for row in ids]
    explained = _explained(tokenizer, ids, decoded, rollouts.prefix_embeddings, batch.query)
    rows = zip(texts, decoded, rollouts.rationale_lengths.tolist(), rollouts.finished.tolist(), rewards, explained, strict=True)
    return [Rationale(*row, *pieces) for *row, pieces in rows]


def _rewards(module: GRACE, batch: Embeddings, rollouts: Rollouts) -> list[dict[str, float]]:
    together = torch.cat([batch.positive, unit_vectors(module, rollouts).unsqueeze(1)], dim=1)
    reward = module.reward(replace(batch, positive=together))
    columns = {**reward.terms, "total": reward.total}
    return [{name: float(values[i, -1]) for name, values in columns.items()} for i in range(len(rollouts))]


def _explained(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Tensor], decoded: Sequence[str], prefixes: Tensor | None, queries: Tensor
) -> Iterator[tuple[list[str], list[float]]]:
    """Yields pieces and similarities of each rationale, see Rationale.

    Args:
        ids: N tensors of int64, [R_i].
        decoded: their texts.
        prefixes: [N, R + 1, D] embeddings after 0 .. R tokens; None: not known.
        queries: [N, D] unit vectors.
    """
    for i, row in enumerate(ids):
        if prefixes is None:
            yield [], []
            continue
        cosines = (normalize(prefixes[i].float(), dim=-1) @ queries[i].to(prefixes.device)).tolist()
        pieces, ends = _pieces(tokenizer, row.tolist(), decoded[i])
        yield pieces, [cosines[end] for end in (0, *ends)]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], decoded: str) -> tuple[list[str], list[int]]:
    """Returns the text in pieces, and after how many tokens each ends; in one piece if the tokenizer does not decode a token at a time."""
    if not tokenizer.is_fast:
        return ([decoded], [len(ids)]) if ids else ([], [])
    stream, pieces, ends = DecodeStream(skip_special_tokens=False), list[str](), list[int]()
    for count, token in enumerate(ids, start=1):
        if piece := stream.step(tokenizer.backend_tokenizer, token):
            pieces.append(piece)
            ends.append(count)
    if (rest := decoded[len("".join(pieces)) :]) and (not ends or ends[-1] < len(ids)):  # a character that was cut
        pieces.append(rest)
        ends.append(len(ids))
    return pieces, ends


def before_and_after(before: list[Rationale], after: list[Rationale], steps: int) -> str:
    """Returns Markdown: each text with its rationale at the start and after `steps` rollout batches."""
    lines = [f"# Rationales before training and after {steps} rollout batches", ""]
    for i, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        lines += [f"## {i}", "", fenced(old.text), ""]
        for title, row in (("before", old), ("after", new)):
            end = "" if row.finished else ", cut at the limit"
            lines += [f"**{title}** ({row.length} tokens{end}):", "", fenced(row.rationale), ""]
    return "\n".join(lines)
