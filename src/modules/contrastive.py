"""Contrastive learning, the baseline of GRACE: InfoNCE on embeddings of texts, without rationales.

batch -> pairs -> embeddings -> InfoNCE -> step
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from src.modules.objectives.info_nce import info_nce
from src.modules.objectives.pairs import PAIRS, Pairs
from src.modules.policy.batching import padded_batches
from src.modules.policy.model import Policy, has_dropout
from src.modules.policy_module import PolicyModule
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.finite import NonFiniteError
from src.modules.training.grad_cache import cached_gradient
from src.modules.training.metrics import contrastive_metrics
from src.modules.types import Rollouts, without_rationales
from src.records import Triplet
from src.utils.timing import timed


class Contrastive(PolicyModule):
    """Trains a policy's embeddings of texts by InfoNCE: supervised, or as unsupervised SimCSE.

    One `training_step` is one optimiser step on one batch, all texts of which are compared with each other, however many fit into memory:
    see training/grad_cache.py.

    Args:
        policy: embeds; its encoder must be live.
        engine: writes rationales for callbacks; none is written in training.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        pairs: `supervised`, a query and its positive, with hard negatives; `dropout`, a text and itself.
        title: the method's name in tables.
        temperature: of InfoNCE.
        micro_batch_tokens: most tokens in one forward and backward pass, padding included; a batch within it takes one pass, and not two.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: see PolicyModule.
        seed: of dropout; each batch draws its own stream from it, so that a resumed run draws the same.

    Raises:
        ValueError: a temperature or a size out of range, unknown pairs, or a frozen encoder.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        instruction: str | None,
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
        """Raises ValueError with several processes, which would miss each other's texts; or see PolicyModule."""
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices: {self.trainer.world_size} processes, and {self.title} trains in one so far; use trainer.devices=1"
            )

    def on_fit_start(self) -> None:
        """Raises ValueError if `pairs` is `dropout` and the policy has no dropout."""
        if self.hparams["pairs"] == "dropout" and not has_dropout(self.policy, self.sequences(["Two views of one text."])):
            raise ValueError(
                "module.pairs=dropout: both views of a text are the same, as the policy drops nothing in training; set "
                "policy.attention_dropout (0.3 is common for language models) or policy.lora.lora_dropout above 0"
            )

    def sequences(self, texts: list[str]) -> Rollouts:
        """Returns prompts of texts without rationales, on the policy's device."""
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
        self.batch_metrics = contrastive_metrics(embeddings, pairs, update, seconds, int(sequences.lengths.sum()), names)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draws, while in force, from a stream of the seed, the number of the batch and the rank."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash((self.hparams["seed"], self.rollout_batches, self.global_rank)) % 2**31)  # as in GRACE
            yield

    def gradient(self, sequences: Rollouts, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Accumulates the gradient of InfoNCE; returns the loss and the [B + N, D] embeddings of queries and documents, detached."""
        parts = list(padded_batches(sequences.lengths, self.hparams["micro_batch_tokens"]))
        order = torch.cat(parts).argsort().to(sequences.lengths.device)  # from the parts' order to that of the texts

        def loss(embeddings: Tensor) -> Tensor:
            queries, documents = embeddings[order].split([len(pairs.queries), len(pairs.documents)])
            own, left_out = pairs.own.to(order.device), pairs.left_out.to(order.device)
            return info_nce(queries, documents, own, self.hparams["temperature"], left_out)

        value, embeddings = cached_gradient(
            lambda rows: self.policy.embed(sequences[rows]), parts, loss, self.manual_backward, self.policy.device
        )
        return value, embeddings[order]
