"""The run's checkpoints and its export as models in MLflow, with the scores that they earned."""

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from src.callbacks.checkpoint import BEST, LAST
from src.callbacks.export import Export
from src.callbacks.monitoring import as_policy_module
from src.utils.checkpoint_io import CONTENTS
from src.utils.tracking import mlflow_loggers


class LogModels(L.Callback):
    """When a run has ended, links last, best and export to it as MLflow's LoggedModels: names, places and scores, no files.

    It takes some 0.1 s a model in a SQLite store.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in mlflow_loggers(trainer):
            for name, (place, step) in models(trainer, pl_module).items():
                logger.log_model(name, str(place), step)


def models(trainer: L.Trainer, module: L.LightningModule) -> dict[str, tuple[Path, int]]:
    """Returns the models of a run that has ended, by name: where each is, and the number of its rollout batches."""
    batches = as_policy_module(module).rollout_batches
    found: dict[str, tuple[Path, int]] = {}
    if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
        folder = Path(str(trainer.checkpoint_callback.dirpath))
        for name, link in (("last", LAST), ("best", BEST)):
            if (folder / link / CONTENTS).exists():
                found[name] = (folder / link, int(json.loads((folder / link / CONTENTS).read_text(encoding="utf-8"))["rollout_batches"]))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Export) and callback.folder.exists():
            found["export"] = (callback.folder, batches)
    return found
