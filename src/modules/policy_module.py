"""The base of the LightningModules that train a policy: encoder, optimiser step, checkpoints."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from src.modules.distributed.fsdp import global_grad_norm
from src.modules.distributed.ranks import Ranks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings, RationaleFor, rationale_for
from src.modules.policy.files import policy_files
from src.modules.policy.lora import lora_settings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, require_room
from src.modules.rollouts.engine import RolloutEngine
from src.modules.training.finite import NonFiniteError
from src.modules.training.metrics import BatchMetrics
from src.records import Triplet

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed")
"""Of the trainer: weights are float32."""


class PolicyModule(L.LightningModule):
    """Trains a policy on batches of triplets by manual optimisation; subclasses define `training_step`.

    Its hyperparameters hold learning_rate, warmup_steps, weight_decay (AdamW; linear warm-up over optimiser steps, then
    constant) and max_grad_norm (gradients are scaled down to it).

    Attributes:
        title: the method's name in tables.
        unit: what one batch is called in messages.
        settings: of the encoder that is trained.
        rollout_batches: batches trained on so far, with rollouts or without.
        report: of the last batch.

    Args:
        policy: is trained.
        engine: writes rationales, for training or for callbacks.
        instruction, max_prompt_tokens, template_kwargs: of the prompt renderer.
        rationale: whether embeddings are trained and evaluated with rationales.

    Raises:
        ValueError: prompt and rationale can be longer than the policy's context.
    """

    title = "GRACE"
    unit = "batch"

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        instruction: str | None,
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
            rationale=rationale_for(rationale),
        )
        self.renderer = PromptRenderer(policy.tokenizer, instruction, max_prompt_tokens, self.settings.template_kwargs)
        self.rollout_batches = 0
        self.batch_metrics: BatchMetrics | None = None

    def encoder(self, rationale: RationaleFor | bool | None = None, temperature: float = 0.0, bf16: bool | None = None) -> RationaleEncoder:
        """Returns the policy as it is now as an encoder of texts; with rationales if it is trained with them, by default."""
        rationale = self.settings.rationale if rationale is None else rationale
        return RationaleEncoder(self.policy, self.settings, self.engine, rationale, temperature, bf16=bf16)

    def setup(self, stage: str) -> None:
        """Raises ValueError for float16 arithmetic (gradients are clipped here without unscaling) or weights in bfloat16 (too coarse)."""
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
        """Checks, clips and applies the gradient; returns its norm before clipping.

        Raises:
            NonFiniteError: it is not finite.
        """
        optimizer = self.optimizers()
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = global_grad_norm(gradients)
        if not math.isfinite(norm):  # on every rank, as gradients are exchanged
            records = [name for names in self.ranks.objects(list(instance_ids)) for name in names]
            raise NonFiniteError(
                f"gradient norm is {norm} in {self.unit} {self.rollout_batches}, records {', '.join(records)}; "
                "the weights were not changed. Lower module.learning_rate, or look at these records"
            )
        scale = self.hparams["max_grad_norm"] / (norm + 1e-6)
        for gradient in gradients if scale < 1 else []:  # Lightning refuses to clip for a fused optimiser
            gradient.mul_(scale)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return norm

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        h = self.hparams
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        fused = self.device.type in ("cpu", "cuda")  # one kernel for all weights
        optimizer = torch.optim.AdamW(trained, lr=h["learning_rate"], weight_decay=h["weight_decay"], fused=fused)
        warmup = max(1, h["warmup_steps"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def transfer_batch_to_device(self, batch: list[Triplet], device: torch.device, dataloader_idx: int) -> list[Triplet]:
        """Returns the batch, which is text."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what it takes to build the policy again, under `grace`."""
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
        """Restores the count of batches.

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


def use_new_settings(checkpoint: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Puts a changed learning rate or weight decay into the checkpoint's optimiser and scheduler, which would restore the old ones."""
    begun = checkpoint["hyper_parameters"]
    changed = [name for name in ("learning_rate", "weight_decay") if begun[name] != settings[name]]
    for name in changed:
        log.warning("goes on with module.%s=%g in place of %g", name, settings[name], begun[name])
    rate = settings["learning_rate"]
    for group in (group for state in checkpoint["optimizer_states"] if changed for group in state["param_groups"]):
        if "learning_rate" in changed:
            group["lr"], group["initial_lr"] = group["lr"] / begun["learning_rate"] * rate, rate
        group["weight_decay"] = settings["weight_decay"]
    for scheduler in checkpoint["lr_schedulers"] if "learning_rate" in changed else []:
        scheduler["base_lrs"] = [rate] * len(scheduler["base_lrs"])
