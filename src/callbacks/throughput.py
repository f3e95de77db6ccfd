"""How fast training goes, and what it takes."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from src.callbacks.monitoring import MonitoringCallback, last_report
from src.modules.policy_module import PolicyModule
from src.modules.training.metrics import BatchMetrics


def peak_memory(device: torch.device) -> dict[str, float]:
    """Highest memory use so far in GiB: resident memory of this process and, on a GPU, what torch allocated there."""
    # getrusage counts kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        memory["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory


def speeds(report: BatchMetrics) -> dict[str, float]:
    """Tokens a second of sampling and of updating, and the seconds of each phase of one batch."""
    metrics = {f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
    for phase, tokens in (("rollout", report.rollout_tokens), ("update", report.update_tokens)):
        if report.seconds.get(phase):
            metrics[f"throughput/{phase}_tokens_per_second"] = tokens / report.seconds[phase]
    return metrics


class Throughput(MonitoringCallback):
    """Logs `speeds`, `peak_memory` and the seconds of the whole batch, evaluations between batches left out.

    Memory is that of the rank that takes the most.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def after_batch(self, trainer: L.Trainer, module: PolicyModule) -> None:
        memory = peak_memory(module.device)
        metrics = speeds(last_report(module)) | dict(zip(memory, module.ranks.largest(*memory.values()), strict=True))
        metrics["seconds/batch"] = time.perf_counter() - self._began
        module.log_dict(metrics, on_step=True, on_epoch=False)
