"""Export of the trained policy."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.distributed.fsdp import FSDPModule

from src.modules.distributed.fsdp import summon_full_params, unsharded_copy
from src.modules.encoder.export import export
from src.modules.encoder.settings import RationaleFor, rationale_for
from src.modules.policy.model import Policy

log = logging.getLogger(__name__)


class Export(L.Callback):
    """Writes the policy, its tokenizer and the settings of its embeddings to a folder when training ends.

    For any LightningModule with a `policy` and encoder `settings`.

    Args:
        folder: the folder.
        dtype: of the weights on disk.
        rationale: the texts that the encoder writes about (see EncoderSettings); None: as the policy is trained.

    Raises:
        ValueError: an unknown `rationale`.
    """

    def __init__(
        self,
        folder: str,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        rationale: RationaleFor | None = None,
    ) -> None:
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)
        self.rationale = None if rationale is None else rationale_for(rationale)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        policy: Policy = pl_module.policy
        settings = pl_module.settings if self.rationale is None else replace(pl_module.settings, rationale=self.rationale)
        with summon_full_params(policy):
            if trainer.is_global_zero:
                export(unsharded_copy(policy) if isinstance(policy, FSDPModule) else policy, settings, self.folder, self.dtype)
                log.info("exported to %s", self.folder)
