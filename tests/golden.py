"""Five rollout batches of the default experiment as numbers. `python -m tests.golden` records them anew.

In float32 on one thread a run repeats itself to the last bit on one machine. Another processor rounds otherwise, and now
and then that is enough for another token to be sampled: if only the later batches differ there, it is likely that.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "golden_tiny_sup.json"
OVERRIDES = [
    *("experiment=tiny_sup", "seed=0", "logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    *("trainer.limit_train_batches=5", "packages.train=[urllib3]"),  # its version is pinned, so its texts are
]


class Recorder(L.Callback):
    """Writes what every rollout batch did to a file of JSON."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.batches: list[dict[str, float]] = []
        self.start: list[torch.Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        report = pl_module.report
        moved = [now.detach() - then for now, then in zip(pl_module.parameters(), self.start, strict=True)]
        self.batches.append(
            {
                "loss": report.update["loss"],
                "gradient_norm": report.update["gradient_norm"],
                "entropy": report.update["entropy"],
                "moved": float(torch.nn.utils.get_total_norm(moved)),  # how far the weights are from where they began
                "reward": float(report.reward.total.mean()),
                "rationale_tokens": int(report.rationale_lengths.sum()),
            }
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.write_text(json.dumps(self.batches, indent=2) + "\n", encoding="utf-8")


def trajectory(folder: Path) -> list[dict[str, float]]:
    """What the five batches did, from a run of train.py's own `train` on one thread."""
    from train import train

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg: DictConfig = compose("train", overrides=OVERRIDES)
    with open_dict(cfg):
        cfg.paths.output_dir = str(folder)
        cfg.callbacks.recorder = {"_target_": "tests.golden.Recorder", "path": str(folder / "batches.json")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(cfg)
    finally:
        torch.set_num_threads(threads)
    batches: list[dict[str, float]] = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    return batches


if __name__ == "__main__":
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        RECORD.write_text(json.dumps(trajectory(Path(temporary)), indent=2) + "\n", encoding="utf-8")
    print(f"recorded to {RECORD}")
