"""What contrastive learning does to the embeddings, batch by batch."""

from typing import cast

import lightning as L

from src.callbacks.monitoring import MonitoringCallback, last_report
from src.modules.contrastive import Contrastive
from src.modules.policy_module import PolicyModule
from src.modules.training.metrics import ContrastiveMetrics


class ContrastiveDiagnostics(MonitoringCallback):
    """Logs update/loss, update/grad_norm, contrastive/accuracy, contrastive/positive_similarity and
    contrastive/unrelated_similarity after every batch, and names the step of all that is logged after it.
    """

    def at_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not isinstance(module, Contrastive):
            raise TypeError(f"callbacks.contrastive_diagnostics: {type(module).__name__} has no pairs to watch; choose callbacks=default")

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        report = cast(ContrastiveMetrics, last_report(module))
        metrics = {f"update/{name}": value for name, value in report.update.items()}
        for name in ("accuracy", "positive_similarity", "unrelated_similarity"):
            metrics[f"contrastive/{name}"] = getattr(report, name)
        # Lightning sends all that is logged in this hook in one call, at the step that is named here.
        module.log_dict(metrics | {"step": float(module.rollout_batches)}, on_step=True, on_epoch=False, sync_dist=True)
