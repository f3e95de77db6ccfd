"""Base of the monitoring callbacks, and what several of them share."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from src.modules.distributed.fsdp import summon_full_params
from src.modules.grace import GRACE
from src.modules.objectives.roles import same_texts, texts_of
from src.modules.policy.model import evaluation_mode
from src.modules.policy_module import PolicyModule
from src.modules.training import collector
from src.modules.training.metrics import BatchMetrics
from src.modules.types import Embeddings, Rollouts
from src.records import Triplet
from src.utils.tracking import log_figure, log_metrics

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=PolicyModule)


class MonitoringCallback(L.Callback, Generic[Module]):
    """Acts at three moments of a training by a module of class `applies_to`; does nothing for other modules.

    So one list of callbacks serves every method.
    """

    applies_to: type[PolicyModule] = PolicyModule

    def at_start(self, trainer: L.Trainer, module: Module) -> None:
        """Before the first batch of this process; a resumed run has loaded its state by then."""

    def after_batch(self, trainer: L.Trainer, module: Module) -> None:
        """After each batch; `module.rollout_batches` includes it."""

    def at_end(self, trainer: L.Trainer, module: Module) -> None:
        """After the last batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(as_policy_module(pl_module), self.applies_to):
            self.at_start(trainer, cast(Module, pl_module))
        else:
            log.debug("%s does nothing: it is for %s", type(self).__name__, self.applies_to.__name__)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(pl_module, self.applies_to):
            self.after_batch(trainer, cast(Module, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, self.applies_to):
            self.at_end(trainer, cast(Module, pl_module))


def as_policy_module(module: L.LightningModule) -> PolicyModule:
    """Returns the module; raises TypeError if it is no PolicyModule."""
    if not isinstance(module, PolicyModule):
        raise TypeError(f"these callbacks monitor module=grace and module=contrastive, not {type(module).__name__}: change callbacks=")
    return module


def last_report(module: PolicyModule) -> BatchMetrics:
    """Returns the report of the last batch; raises RuntimeError before the first."""
    if module.batch_metrics is None:
        raise RuntimeError("no batch has been trained on yet, so there is no report of one")
    return module.batch_metrics


def is_due(module: PolicyModule, every_n_rollout_batches: int) -> bool:
    """Returns whether a callback that acts every n batches (0: never) acts after the last one."""
    return every_n_rollout_batches > 0 and module.rollout_batches % every_n_rollout_batches == 0


def log_values(trainer: L.Trainer, metrics: Mapping[str, float], step: int, send: bool = True) -> None:
    """Sends metrics to the loggers (if `send`), and keeps them in `trainer.callback_metrics` for checkpoints and sweeps.

    Unlike Lightning's `log` this works in all hooks, logs before a checkpoint of the batch is saved, and repeats no metric of an
    earlier batch.
    """
    if send:
        log_metrics(trainer, metrics, step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def save_figure(trainer: L.Trainer, figure: Figure, file: Path) -> None:
    """Writes a figure to a file and to MLflow (figures/<name>)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    log_figure(trainer, figure, f"figures/{file.name}")


@contextmanager
def undisturbed(module: PolicyModule) -> Iterator[None]:
    """Disables gradients, sets eval mode and gathers sharded weights; afterwards restores all of it and the random states.

    To be entered by all ranks.
    """
    with isolate_rng(), evaluation_mode(module.policy), summon_full_params(module.policy):
        yield


def fixed_triplets(trainer: L.Trainer, count: int) -> list[Triplet]:
    """Returns held-out records, the same at every call: `trainer.datamodule.fixed_triplets(count)`.

    Raises:
        ValueError: the datamodule has no such method, or gives no record.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by fit(datamodule=...)
    found = datamodule.fixed_triplets(count) if hasattr(datamodule, "fixed_triplets") else []
    if not found:
        raise ValueError(
            f"the datamodule ({type(datamodule).__name__}) has no held-out records: give it a method fixed_triplets(count), or set "
            "callbacks.rationale_table=null callbacks.similarities=null callbacks.starting_policy_kl=null"
        )
    return list(found)


def sample(module: PolicyModule, texts: list[str], temperature: float, seed: int = 0, n: int = 1) -> Rollouts:
    """Samples n rationales for each text from the current policy."""
    return module.engine.generate(module.policy, module.renderer(texts), n=n, temperature=temperature, seed=seed)


def unit_vectors(module: GRACE, rollouts: Rollouts) -> Tensor:
    """Returns [N, D] float32 embeddings of unit length."""
    return collector.unit_vectors(module.policy, rollouts, module.hparams["micro_batch_tokens"])


def embed_triplets(module: GRACE, triplets: Sequence[Triplet], n: int, seed: int = 0) -> Embeddings:
    """Embeds triplets as a training batch: n rollouts of each positive, one of each query and negative, at training's temperatures."""
    b, m = len(triplets), collector.negatives_per_instance(triplets)
    positive = sample(module, texts_of(triplets, "positive"), module.hparams["temperature"], seed, n)
    texts = texts_of(triplets, "query") + texts_of(triplets, "negative")
    others = unit_vectors(module, sample(module, texts, module.hparams["context_temperature"], seed + 1))
    rollouts = unit_vectors(module, positive).unflatten(0, (b, n))
    return Embeddings(others[:b], rollouts, others[b:].unflatten(0, (b, m)), same_texts(triplets, others.device))
