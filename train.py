"""Trains whatever configs/train.yaml composes: `python train.py`, `python train.py experiment=... seed=1`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parent))  # configs/paths reads it

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from src.modules.plan.plan import PlanError, show
from src.utils.epochs import BeginNextEpoch
from src.utils.instantiate import instantiate_all
from src.utils.preemption import StopTogether, preemptible
from src.utils.processes import naming_lost_processes, prepare
from src.utils.quiet import quiet_lightning
from src.utils.renamed_settings import check_arguments, check_config
from src.utils.run_folder import alone_in, register_resolver, starting_point
from src.utils.run_info import log_run_info
from src.utils.run_settings import is_another, settings_of, write_settings
from src.utils.secrets import keep_secrets
from src.utils.sweeps import run_point

register_resolver()  # hydra.run.dir uses it


def train(cfg: DictConfig) -> float | None:
    """Fits what the config describes; returns the last value of `optimized_metric`, if one is named.

    Raises:
        KeyError: no callback or module logged that metric.
        SystemExit: a signal stopped the run, and a checkpoint was saved.
    """
    if cfg.dry_run:
        try:
            show(cfg)
        except (PlanError, FileNotFoundError) as error:
            raise SystemExit(f"train.py: {error}") from error
        return None
    folder = Path(cfg.paths.output_dir)
    with alone_in(folder), preemptible(), naming_lost_processes():
        return fit(cfg, starting_point(cfg.ckpt_path, folder))


def fit(cfg: DictConfig, checkpoint: str | None) -> float | None:
    """Training itself, from its beginning or from a checkpoint."""
    quiet_lightning()
    L.seed_everything(cfg.seed, workers=True)
    datamodule = instantiate(cfg.datamodule)
    module = instantiate(cfg.module)
    loggers = instantiate_all(cfg.get("logger"), "logger")
    callbacks = [*instantiate_all(cfg.get("callbacks"), "callbacks"), StopTogether(), BeginNextEpoch()]
    keeps = any(isinstance(callback, Checkpoint) for callback in callbacks)  # without one Lightning would bring its own
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, enable_checkpointing=keeps)
    prepare(trainer)
    if trainer.is_global_zero:
        folder, settings = Path(cfg.paths.output_dir), settings_of(cfg)
        log_run_info(loggers, cfg, root=Path(cfg.paths.root), anew=is_another(settings, folder, checkpoint))
        write_settings(folder, settings)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)  # a checkpoint runs no code
    if cfg.optimized_metric is None:
        return None
    if cfg.optimized_metric not in trainer.callback_metrics:
        raise KeyError(
            f"optimized_metric={cfg.optimized_metric!r} was never logged; there are: {', '.join(sorted(trainer.callback_metrics))}"
        )
    return float(trainer.callback_metrics[cfg.optimized_metric])


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """The command line: one run, or a point of a sweep."""
    check_config(cfg, "train.py")
    return run_point(cfg, train)


if __name__ == "__main__":
    keep_secrets(sys.argv)
    check_arguments(sys.argv)
    main()
