"""Contrastive learning, which GRACE is compared with: InfoNCE on embeddings of texts alone, no rationale written.

batch -> pairs -> embeddings -> InfoNCE -> step
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from src.modules.objectives.info_nce import info_nce
from src.modules.objectives.pairs import PAIRS, Pairs
from src.modules.policy.loading import has_dropout
from src.modules.policy.model import Policy
from src.modules.policy_module import PolicyModule
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.contrastive_report import contrastive_report
from src.modules.training.grad_cache import cached_gradient, parts_by_length
from src.modules.training.non_finite import NonFiniteError
from src.modules.types import Rollouts, without_rationales
from src.records import Triplet
from src.utils.timing import timed


class Contrastive(PolicyModule):
    """Trains a policy's embeddings of texts by InfoNCE: supervised, or as unsupervised SimCSE.

    One `training_step` is one optimiser step on one batch, whose texts are told apart all at once, however many of them
    fit into memory: see src/modules/training/grad_cache.py.

    Args:
        policy: embeds; its encoder must be live.
        engine: writes rationales for what looks on; none is written in training.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        pairs: what belongs together: `supervised`, a query and its positive, with hard negatives; `dropout`, a text and itself.
        title: the method's name in tables.
        temperature: of InfoNCE.
        micro_batch_tokens: most tokens in one forward and backward pass, padding included; a batch of no more takes one pass
            in place of two.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: see PolicyModule.
        seed: of dropout; each batch draws its own stream from it, so that a resumed run draws what it would have drawn.

    Raises:
        ValueError: a temperature or a size without sense, other pairs, or a frozen encoder, whose embeddings no training moves.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        instruction: str,
        max_prompt_tokens: int = 1024,
        template_kwargs: Mapping[str, str] | None = None,
        pairs: Literal["supervised", "dropout"] = "supervised",
        title: str = "CL",
        temperature: float = 0.05,
        micro_batch_tokens: int = 8192,
        learning_rate: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, engine, instruction, max_prompt_tokens, template_kwargs, rationale=False)
        if pairs not in PAIRS:
            raise ValueError(f"module.pairs={pairs!r} does not exist; it is {' or '.join(PAIRS)}")
        if temperature <= 0:
            raise ValueError(f"module.temperature={temperature}: it must be above 0")
        if micro_batch_tokens < 1:
            raise ValueError(f"module.micro_batch_tokens={micro_batch_tokens}: it must be at least 1")
        if policy.frozen_encoder is not None:
            raise ValueError("policy.encoder=frozen: contrastive learning trains the encoder itself; use policy.encoder=live")
        self.save_hyperparameters(ignore=["policy", "engine", "template_kwargs"])
        self.title = title

    def setup(self, stage: str) -> None:
        """Refuses what would train wrongly in silence.

        Raises:
            ValueError: several processes, which would miss each other's texts; or see PolicyModule.
        """
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices: {self.trainer.world_size} processes, and {self.title} trains in one so far; use trainer.devices=1"
            )

    def on_fit_start(self) -> None:
        """Refuses to train on two equal views.

        Raises:
            ValueError: `pairs` is `dropout`, and there is none.
        """
        if self.hparams["pairs"] == "dropout" and not has_dropout(self.policy, self.sequences(["Two views of one text."])):
            raise ValueError(
                "module.pairs=dropout: both views of a text are the same, as the policy drops nothing in training; set "
                "policy.attention_dropout (0.3 is common for language models) or policy.lora.lora_dropout above 0"
            )

    def sequences(self, texts: list[str]) -> Rollouts:
        """Prompts of texts without rationales, on the policy's device."""
        return without_rationales(self.renderer(texts), self.policy.pad_id).to(self.policy.device)

    def training_step(self, batch: list[Triplet], batch_idx: int) -> None:
        pairs = PAIRS[self.hparams["pairs"]](batch)
        names = [triplet.id for triplet in batch]
        if len(pairs.documents) < 2:
            raise ValueError(
                f"a batch with one document, that of {names[0]}, has nothing to tell it from: ask the datamodule for larger batches "
                "(datamodule.batch_size; of docstrings datamodule.modules_per_batch or datamodule.docstrings_per_module)"
            )
        seconds: dict[str, float] = {}
        self.policy.train()
        with timed(seconds, "update"), self.own_randomness():
            sequences = self.sequences(pairs.texts)
            loss, embeddings = self.gradient(sequences, pairs)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss is {float(loss)} in batch {self.rollout_batches}, records {', '.join(names)}; the weights were not changed"
                )
            norm = self.take_step(names)
        self.rollout_batches += 1
        update = {"loss": float(loss), "grad_norm": norm, "updates": 1.0}
        self.report = contrastive_report(embeddings, pairs, update, seconds, int(sequences.lengths.sum()), names)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """While in force, what is drawn depends on the seed, the batch's number and the rank alone."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash((self.hparams["seed"], self.rollout_batches, self.global_rank)) % 2**31)  # as in GRACE
            yield

    def gradient(self, sequences: Rollouts, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Adds up the gradient of InfoNCE; returns it and the [B + N, D] embeddings of queries and documents, detached."""
        parts = parts_by_length(sequences.lengths, self.hparams["micro_batch_tokens"])
        order = torch.cat(parts).argsort().to(sequences.lengths.device)  # from the parts' order to that of the texts

        def loss(embeddings: Tensor) -> Tensor:
            queries, documents = embeddings[order].split([len(pairs.queries), len(pairs.documents)])
            own, left_out = pairs.own.to(order.device), pairs.left_out.to(order.device)
            return info_nce(queries, documents, own, self.hparams["temperature"], left_out)

        value, embeddings = cached_gradient(
            lambda rows: self.policy.embed(sequences[rows]), parts, loss, self.manual_backward, self.policy.device
        )
        return value, embeddings[order]
