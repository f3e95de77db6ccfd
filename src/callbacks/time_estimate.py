"""Says at the start of a run what it will do on this machine, and about how long it will take."""

import logging
import math

import lightning as L

from src.modules.grace import GRACE
from src.modules.policy_module import PolicyModule
from src.utils.machine import describe_machine, has_gpu, matrix_speed

log = logging.getLogger(__name__)

_REACHED = 0.4  # share of the speed of plain matrix products that a run reaches on two CPU cores; measured on smollm2_sup
_OTHERWISE = 60  # seconds for reading data, MTEB's own work and reports


class TimeEstimate(L.Callback):
    """Logs one line: the machine, the batches, the minutes.

    The minutes are arithmetic over a measured speed: 2 operations a parameter and token to read or write it, 6 to learn from it.

    Args:
        evaluated_texts: distinct texts of all evaluations together.
    """

    def __init__(self, evaluated_texts: int = 0) -> None:
        self.evaluated_texts = evaluated_texts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyModule) or not trainer.is_global_zero:
            return
        batches, data = trainer.limit_train_batches, trainer.datamodule  # type: ignore[attr-defined]
        size = getattr(data, "batch_size", None) or getattr(data, "groups", 0) * getattr(data, "docstrings_per_module", 0)
        if not isinstance(batches, int) or not size:
            return
        half = str(trainer.precision) != "32-true"
        operations = self._operations(pl_module, batches, size, getattr(data, "negatives", 0))
        minutes = (operations / (_REACHED * matrix_speed(half)) + _OTHERWISE) / 60
        what = f"{type(pl_module).__name__}: {batches} batches of {size} texts on {describe_machine()}"
        # a GPU is bound by how fast kernels are launched, of which this arithmetic knows nothing
        log.info(what if has_gpu() else f"{what}; about {max(1, math.ceil(minutes))} minutes, evaluation included")

    def _operations(self, module: PolicyModule, batches: int, instances: int, negatives: int) -> float:
        parameters = sum(p.numel() for p in module.policy.model.parameters())
        prompt = 0.6 * module.settings.max_prompt_tokens
        written = module.engine.max_new_tokens if module.settings.rationale else 0
        positives = instances * (prompt + written * (module.hparams["num_generations"] if isinstance(module, GRACE) else 0))
        others = instances * (1 + negatives) * (prompt + written)
        read = self.evaluated_texts * (prompt + written) + batches * (positives + others)
        return parameters * (2 * read + 6 * batches * (positives + others))
