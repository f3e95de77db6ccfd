"""Cold start: trains a small model on language, demonstrations of rationales and InfoNCE at once."""

from collections.abc import Sequence
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from experiments.tiny_policy.demonstrations import Demonstration
from src.modules.encoder.settings import EncoderSettings
from src.modules.objectives.info_nce import mean_reciprocal_rank, symmetric_info_nce
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool
from src.modules.prompt.renderer import PromptRenderer
from src.modules.types import Rollouts, join


class ColdStartModule(L.LightningModule):
    """Supervised fine-tuning on demonstrations, with InfoNCE.

    One forward pass per text serves four losses: the language model on the text, the language model on its rationale,
    and InfoNCE between queries and documents pooled without the rationale and with it (causality makes the states
    before the rationale the same in both).

    The first `copy_steps` only copy random tokens, and later batches keep `copy_rows` of that: naming a text's terms
    needs induction heads, which form within 150 such steps and did not within 700 on docstrings alone.

    Where the rationale is pooled, it is cut after the terms in every second row: the summary of a document is its
    query, and an embedding that used only the summary would fail where the policy sums up badly.

    Args:
        instruction, max_prompt_tokens: of the prompt renderer.
        max_rationale_tokens: length at which a demonstration is cut.
        text_weight, rationale_weight, contrastive_weight: of the losses.
        temperature: of InfoNCE.
        copy_steps, copy_rows: steps of copying alone (64 rows), and rows of it beside the demonstrations afterwards.
        learning_rate, warmup_steps, weight_decay: AdamW with a cosine decay to a hundredth over trainer.max_steps.
        compile: compile the backbone (needs a C++ compiler; about twice as fast on a CPU).
    """

    def __init__(
        self,
        policy: Policy,
        instruction: str,
        max_prompt_tokens: int = 144,
        max_rationale_tokens: int = 64,
        text_weight: float = 0.5,
        rationale_weight: float = 1.0,
        contrastive_weight: float = 0.5,
        temperature: float = 0.05,
        copy_steps: int = 250,
        copy_rows: int = 8,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["policy"])
        self.policy = policy
        self.settings = EncoderSettings(instruction, max_prompt_tokens, max_rationale_tokens)
        self.renderer = PromptRenderer(policy.tokenizer, instruction, max_prompt_tokens)
        self._backbone = torch.compile(policy.model.base_model, dynamic=False) if compile else policy.model.base_model
        self._think_end: int = policy.tokenizer.convert_tokens_to_ids("</think>")  # type: ignore[assignment]

    def sequences(self, texts: Sequence[str], rationales: Sequence[str]) -> Rollouts:
        """Returns texts with given rationales, padded to a multiple of 32 so that few shapes are compiled."""
        encoded = self.policy.tokenizer(list(rationales), add_special_tokens=False)["input_ids"]
        limit, eos = self.hparams["max_rationale_tokens"], self.policy.tokenizer.eos_token_id
        ids = [torch.tensor([*row, eos][:limit]) for row in encoded]
        rollouts = join(self.renderer(texts), ids, torch.ones(len(ids), dtype=torch.bool), self.policy.pad_id)
        padding = -rollouts.input_ids.shape[1] % 32
        return replace(rollouts, input_ids=F.pad(rollouts.input_ids, (0, padding), value=self.policy.pad_id)).to(self.device)

    def language_losses(self, rollouts: Rollouts, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean cross-entropy over the tokens of the texts, and over those of the rationales (nats)."""
        weight = self.policy.model.get_output_embeddings().weight
        positions = torch.arange(rollouts.input_ids.shape[1], device=self.device)
        in_text = (positions >= rollouts.text_starts.unsqueeze(1)) & (positions < rollouts.prompt_lengths.unsqueeze(1))
        losses = []
        for mask in (in_text, rollouts.rationale_mask):
            rows, columns = mask.nonzero(as_tuple=True)
            targets = rollouts.input_ids[rows, columns]
            parts = zip(hidden[rows, columns - 1].split(2048), targets.split(2048), strict=True)
            losses.append(torch.stack([F.cross_entropy(h @ weight.T, t, reduction="sum") for h, t in parts]).sum() / len(targets))
        return losses[0], losses[1]

    def copying_loss(self, rows: int, tokens: int = 24) -> Tensor:
        """Returns the mean cross-entropy of the second half of `rows` sequences that repeat random `tokens`."""
        first = torch.randint(len(self.policy.tokenizer), (rows, tokens), device=self.device)
        hidden = self._backbone(input_ids=first.repeat(1, 2)).last_hidden_state[:, tokens - 1 : -1]
        logits = hidden @ self.policy.model.get_output_embeddings().weight.T
        return F.cross_entropy(logits.flatten(0, 1), first.flatten())

    def pooled(self, rollouts: Rollouts, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns embeddings without the rationale, and with it (cut after the terms in every second row); [N, D] each."""
        positions = torch.arange(rollouts.input_ids.shape[1], device=self.device)
        plain = rollouts.pooling_mask & ~rollouts.rationale_mask
        fences = (rollouts.input_ids == self._think_end) & rollouts.rationale_mask  # an instruction may contain the token too
        ends = fences.long().argmax(dim=1)
        every_second = torch.arange(len(rollouts), device=self.device) % 2 == 0
        cut = every_second & (ends > 0)
        with_rationale = rollouts.pooling_mask & (~cut.unsqueeze(1) | (positions <= ends.unsqueeze(1)))
        return pool(hidden, plain), pool(hidden, with_rationale)

    def losses(self, batch: list[Demonstration]) -> dict[str, Tensor]:
        """Returns the losses of a batch, and the mean reciprocal rank of documents within it."""
        texts = [
            self.sequences([d.query for d in batch], [d.query_rationale for d in batch]),
            self.sequences([d.document for d in batch], [d.document_rationale for d in batch]),
        ]
        hidden = [self._backbone(input_ids=rollouts.input_ids).last_hidden_state for rollouts in texts]
        language = [self.language_losses(rollouts, states) for rollouts, states in zip(texts, hidden, strict=True)]
        (query, query_r), (document, document_r) = [self.pooled(rollouts, states) for rollouts, states in zip(texts, hidden, strict=True)]
        return {
            "text": language[1][0],
            "query_rationale": language[0][1],
            "document_rationale": language[1][1],
            "nce": symmetric_info_nce(query, document, self.hparams["temperature"]),
            "nce_rationale": symmetric_info_nce(query_r, document_r, self.hparams["temperature"]),
            "mrr": mean_reciprocal_rank(query.detach(), document.detach()),
        }

    def training_step(self, batch: list[Demonstration], batch_idx: int) -> Tensor:
        h = self.hparams
        if self.global_step < h["copy_steps"]:
            loss = self.copying_loss(rows=64)
            self.log("train/copying", loss.detach(), batch_size=len(batch))
            return loss
        parts = self.losses(batch)
        copying = self.copying_loss(h["copy_rows"])
        loss = (
            h["text_weight"] * parts["text"]
            + h["rationale_weight"] * (parts["query_rationale"] + 3 * parts["document_rationale"]) / 4
            + h["contrastive_weight"] * (parts["nce"] + parts["nce_rationale"]) / 2
            + 0.1 * copying
        )
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=len(batch))
        self.log("train/copying", copying.detach(), batch_size=len(batch))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: list[Demonstration], batch_idx: int) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.losses(batch).items()}, batch_size=len(batch))

    def transfer_batch_to_device(self, batch: list[Demonstration], device: torch.device, dataloader_idx: int) -> list[Demonstration]:
        """Batches are text: nothing to move."""
        return batch

    def on_fit_start(self) -> None:
        self.policy.train()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        h = self.hparams
        decayed = [p for p in self.policy.parameters() if p.ndim >= 2]
        plain = [p for p in self.policy.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": h["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
            lr=h["learning_rate"],
            betas=(0.9, 0.95),
        )
        steps, warmup = self.trainer.max_steps, h["warmup_steps"]
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), h["learning_rate"] / 100)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
