"""What the LightningModules that train a policy have in common: its encoder, its optimiser's step, its checkpoints."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from src.modules.distributed.fsdp import global_grad_norm
from src.modules.distributed.ranks import Ranks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.loading import policy_files
from src.modules.policy.lora import lora_settings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, require_room
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.batch_report import BatchReport
from src.modules.training.non_finite import NonFiniteError
from src.modules.training.resuming import use_new_settings
from src.records import Triplet

PRECISIONS = ("32-true", "bf16-mixed")
"""Of the trainer: weights are float32."""


class PolicyModule(L.LightningModule):
    """Trains a policy on batches of triplets, by manual optimisation; how is up to `training_step` of the class below it.

    Its hyperparameters hold learning_rate, warmup_steps, weight_decay (AdamW; linear warm-up over optimiser steps, then
    constant) and max_grad_norm (gradients are scaled down to it).

    Attributes:
        title: the method's name in tables.
        unit: what one batch is called in messages.
        settings: of the encoder that comes of it.
        rollout_batches: batches trained on so far, whether anything was rolled out for them or not.
        report: of the last batch.

    Args:
        policy: is trained.
        engine: writes rationales, for training or for what looks on.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        rationale: whether embeddings are trained, and so to be evaluated, with rationales.

    Raises:
        ValueError: lengths that the policy's context does not hold.
    """

    title = "GRACE"
    unit = "batch"

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        instruction: str,
        max_prompt_tokens: int,
        template_kwargs: Mapping[str, str] | None,
        rationale: bool,
    ) -> None:
        super().__init__()
        require_room(policy.context, max_prompt_tokens, engine.max_new_tokens if rationale else 0)
        self.automatic_optimization = False
        self.policy, self.engine = policy, engine
        self.settings = EncoderSettings(
            instruction=instruction,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=engine.max_new_tokens,
            pooling=policy.pooling,
            layer=policy.layer,
            template_kwargs=dict(template_kwargs or {}),
            rationale=rationale,
        )
        self.renderer = PromptRenderer(policy.tokenizer, instruction, max_prompt_tokens, self.settings.template_kwargs)
        self.rollout_batches = 0
        self.report: BatchReport | None = None

    def encoder(self, rationale: bool | None = None, temperature: float = 0.0) -> RationaleEncoder:
        """The policy as it is now, as an encoder of texts; with rationales if it is trained with them, unless told otherwise."""
        rationale = self.settings.rationale if rationale is None else rationale
        return RationaleEncoder(self.policy, self.settings, self.engine, rationale=rationale, temperature=temperature)

    def setup(self, stage: str) -> None:
        """Refuses what would train wrongly in silence.

        Raises:
            ValueError: float16 arithmetic (its gradients are scaled where they are clipped here), or weights in bfloat16 (most steps
                are smaller than the distance to the next of its numbers).
        """
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.trainer.precision}: use bf16-mixed or 32-true. float16 would overflow its loss scale, and "
                "weights in bfloat16 stay where they are at the rates of training"
            )

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return Ranks.of(self)

    def take_step(self, instance_ids: Sequence[str]) -> float:
        """Clips, checks and applies the gradient; returns its norm before clipping.

        Raises:
            NonFiniteError: it is not finite.
        """
        optimizer = self.optimizers()
        norm = global_grad_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        if not math.isfinite(norm):  # on every rank, as gradients are exchanged
            records = [name for names in self.ranks.objects(list(instance_ids)) for name in names]
            raise NonFiniteError(
                f"gradient norm is {norm} in {self.unit} {self.rollout_batches}, records {', '.join(records)}; "
                "the weights were not changed. Lower module.learning_rate, or look at these records"
            )
        self.clip_gradients(optimizer, self.hparams["max_grad_norm"], "norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return norm

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        h = self.hparams
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=h["learning_rate"], weight_decay=h["weight_decay"])
        warmup = max(1, h["warmup_steps"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def transfer_batch_to_device(self, batch: list[Triplet], device: torch.device, dataloader_idx: int) -> list[Triplet]:
        """Batches are text: nothing to move."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what it takes to make the policy again, under `grace`."""
        checkpoint["grace"] = {
            "method": type(self).__name__,
            "policy_path": self.policy.path,
            "policy_files": policy_files(self.policy),
            "encoder": "live" if self.policy.frozen_encoder is None else "frozen",
            "lora": lora_settings(self.policy.model),
            "settings": self.settings.to_dict(),
            "rollout_batches": self.rollout_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the count of batches from it.

        Raises:
            ValueError: another method's checkpoint.
        """
        method = checkpoint["grace"].get("method", type(self).__name__)
        if method != type(self).__name__:
            raise ValueError(
                f"ckpt_path holds a run of {method}, which {type(self).__name__} cannot go on with; begin with its export (policy.path=)"
            )
        use_new_settings(checkpoint, self.hparams)
        self.rollout_batches = checkpoint["grace"]["rollout_batches"]
