"""Export of the trained policy, with its model card."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from huggingface_hub import EvalResult
from torch.distributed.fsdp import FSDPModule

from src.callbacks.final_report import FinalReport
from src.callbacks.rationale_table import RationaleTable
from src.modules.distributed.fsdp import unsharded_copy
from src.modules.encoder.card import TrainingFacts, write_card
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings, RationaleFor, rationale_for
from src.modules.grace import GRACE
from src.modules.policy.model import Policy

log = logging.getLogger(__name__)


class Export(L.Callback):
    """Writes the policy, its tokenizer, the settings of its embeddings and a model card to a folder when training ends.

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
        settings = self._exported(pl_module)
        whole = unsharded_copy(policy) if isinstance(policy, FSDPModule) else policy
        if trainer.is_global_zero and whole is not None:
            export(whole, settings, self.folder, self.dtype)
            log.info("exported to %s", self.folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the card again: by now other callbacks have scored the policy."""
        if trainer.is_global_zero and self.folder.is_dir():
            policy: Policy = pl_module.policy
            dimension = int(policy.model.config.get_text_config().hidden_size)
            write_card(self.folder, policy.path, dimension, self._exported(pl_module), training_facts(trainer, pl_module))

    def _exported(self, module: Any) -> EncoderSettings:
        settings: EncoderSettings = module.settings
        return settings if self.rationale is None else replace(settings, rationale=self.rationale)


def training_facts(trainer: L.Trainer, module: Any) -> TrainingFacts:
    """Returns what a run knows of its training: its data, its settings, its scores if it has a final report, and a rationale."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by fit(datamodule=...)
    report = next((callback for callback in _callbacks(trainer) if isinstance(callback, FinalReport)), None)
    tables = [callback for callback in _callbacks(trainer) if isinstance(callback, RationaleTable) and callback.after]
    title = str(getattr(module, "title", "GRACE"))
    return TrainingFacts(
        method=title,
        data=getattr(data, "description", ""),
        datasets=getattr(data, "hub_names", ()),
        settings=dict(_settings(module)),
        scores=list(_results(report, title)) if report else (),
        table=report.rows if report else {},
        example=(tables[0].after[0].text, tables[0].after[0].rationale) if tables else None,
    )


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _settings(module: Any) -> Iterator[tuple[str, str]]:
    """Yields names and values of what decides on a training."""
    if isinstance(module, GRACE):
        yield "K, rationales of a text", str(module.hparams["num_generations"])
        base = getattr(module.reward_function, "reward", None)
        yield "reward", _named(module.reward_function) + (f" on {_named(base)}" if callable(base) else "")
        yield "advantage", _named(module.algorithm.advantage)
    for name in ("pairs", "temperature", "learning_rate", "seed"):
        if name in module.hparams:
            yield name.replace("_", " "), str(module.hparams[name])
    yield "batches", str(getattr(module, "rollout_batches", "unknown"))


def _named(function: Callable[..., Any]) -> str:
    """Returns the name of a function or module, with the arguments that a partial has set."""
    if isinstance(function, partial):
        return f"{_named(function.func)}({', '.join(f'{name}={value}' for name, value in function.keywords.items())})"
    return str(getattr(function, "__name__", type(function).__name__))


def _results(report: FinalReport, row: str) -> Iterator[EvalResult]:
    """Yields the main score of each task, a fraction, as the hub's model-index has it."""
    for task in report.tasks if row in report.scores else ():
        meta = task.metadata
        yield EvalResult(
            task_type=meta.type,
            dataset_type=meta.dataset["path"],
            dataset_name=meta.name,
            dataset_revision=meta.dataset["revision"],
            metric_type=meta.main_score,
            metric_value=round(report.scores[row].tasks[meta.name], 4),
        )
