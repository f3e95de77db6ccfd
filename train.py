"""Trains what configs/train.yaml composes: `python train.py`, `python train.py experiment=... seed=1`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it

from src.utils.ready import require_ready

require_ready("train.py")

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from src.callbacks.logged_models import LogModels
from src.datamodules.preview import show_records
from src.datamodules.sources import require_sources
from src.modules.plan.plan import PlanError, show
from src.utils.plain_errors import plain_errors
from src.utils.preemption import BeginNextEpoch, StopOnSignal, preemptible
from src.utils.renamed_settings import check_arguments, check_config
from src.utils.run_folder import list_run, register_resolver, reserve_folder, starting_point
from src.utils.run_info import log_run_info
from src.utils.run_settings import data_settings, require_same_data, settings_changed, settings_of, write_settings
from src.utils.secrets import keep_secrets
from src.utils.sweeps import run_point
from src.utils.tracking import mlflow_loggers
from src.utils.trainer import instantiate_all, prepare_processes, quiet_lightning

register_resolver()  # hydra.run.dir uses it


def setup(cfg: DictConfig) -> L.Trainer:
    """Returns the trainer of a config, with its loggers and callbacks."""
    quiet_lightning()
    callbacks = [*instantiate_all(cfg.get("callbacks"), "callbacks"), StopOnSignal(), BeginNextEpoch(), LogModels()]
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)  # Lightning would add its own
    loggers = instantiate_all(cfg.get("logger"), "logger") or False
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, enable_checkpointing=saves)
    prepare_processes(trainer)
    return trainer


def fit(cfg: DictConfig, checkpoint: str | None) -> float | None:
    """Trains from the start or from a checkpoint; returns the last value of `optimized_metric`, if one is named.

    Raises:
        KeyError: nothing logged that metric.
    """
    trainer = setup(cfg)
    L.seed_everything(cfg.seed, workers=True)
    datamodule, module = instantiate(cfg.datamodule), instantiate(cfg.module)
    if trainer.is_global_zero:
        data = datamodule.contents() if hasattr(datamodule, "contents") else None
        folder, settings = Path(cfg.paths.output_dir), settings_of(cfg) | data_settings(data)
        require_same_data(settings, checkpoint, cfg.allow_changed_data)
        new_run = settings_changed(settings, folder, checkpoint)
        what = f"{getattr(module, 'title', type(module).__name__)} of `{OmegaConf.select(cfg, 'policy.path')}`"
        log_run_info(trainer.loggers, cfg, Path(cfg.paths.root), new_run, data, what)
        for logger in mlflow_loggers(trainer):
            logger.watch_machine()
        write_settings(folder, settings)
        export = OmegaConf.select(cfg, "callbacks.export.folder", default=None)
        for place in (folder, *([] if export is None else [Path(export)])):
            list_run(place, Path(cfg.paths.output_root))
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)  # a checkpoint runs no code
    name, metrics = cfg.optimized_metric, trainer.callback_metrics
    if name is None:
        return None
    if name not in metrics:
        raise KeyError(f"optimized_metric={name!r} was never logged; there are: {', '.join(sorted(metrics))}")
    return float(metrics[name])


def train(cfg: DictConfig) -> float | None:
    """Runs `fit` in the run's folder, or prints the plan of a dry run.

    Raises:
        SystemExit: a signal stopped the run after saving a checkpoint, there is no plan of such a config, or model or data are out of
            reach.
    """
    if cfg.dry_run:
        try:
            show(cfg)
            show_records(cfg)
        except (PlanError, FileNotFoundError) as error:
            raise SystemExit(f"train.py: {error}") from error
        return None
    try:
        require_sources(cfg)
    except FileNotFoundError as error:
        raise SystemExit(f"train.py: {error}") from error
    folder = Path(cfg.paths.output_dir)
    with reserve_folder(folder), preemptible():
        return fit(cfg, starting_point(cfg.ckpt_path, folder))


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """The command line: one run, or a point of a sweep."""
    check_config(cfg, "train.py")
    return run_point(cfg, train)


if __name__ == "__main__":
    with plain_errors("train.py"):
        keep_secrets(sys.argv)
        check_arguments(sys.argv)
        main()
