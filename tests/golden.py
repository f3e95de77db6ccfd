"""Rollout batches of the default experiment as numbers. `python -m tests.golden` records them anew.

The record has to hold on any processor, so tokens are not sampled from the policy (see tests/drawn.py). Everything else is that
of the experiment: data, prompts, seeds, the engine's passes, rewards, advantages, loss and optimiser. Of sampling there are tests
in tests/modules/rollouts/test_hf.py.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from torch import Tensor

from src.modules.policy.model import Policy
from src.modules.rollouts.engine import Request
from src.modules.types import Rollouts
from tests.drawn import DrawnRationales

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "golden_tiny_sup.json"
OVERRIDES = [
    *("experiment=tiny_sup", "seed=0", "logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    *("trainer.limit_train_batches=2", "packages.train=[urllib3]"),  # its version is pinned, so its texts are
    "rollout._target_=tests.golden.Asked",
]


class Asked(DrawnRationales):
    """Notes what it is asked for.

    Attributes:
        asked: what it was asked for, call by call: a digest of the prompts' ids and of the seeds, and the rest in words.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[str] = []

    def generate_all(self, policy: Policy, requests: Sequence[Request]) -> list[Rollouts]:
        for one in requests:
            prompts = one.prompts
            ids = repr([[row.tolist() for row in prompts.ids], prompts.text_starts.tolist(), torch.as_tensor(one.seed).tolist()])
            digest = hashlib.sha256(ids.encode()).hexdigest()[:16]
            which = f"{one.n} rationales for each of {len(prompts)} prompts at temperature {one.temperature}"
            self.asked.append(f"{which}, prompts and seeds {digest}")
        return super().generate_all(policy, requests)


class Recorder(L.Callback):
    """Writes what every rollout batch did to a file of JSON: what is exact, and numbers that are rounded."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.batches: list[dict[str, Any]] = []
        self.start: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = [p.detach().clone() for p in moving(pl_module)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        report, asked = pl_module.batch_metrics, pl_module.engine.asked
        moved = [now.detach() - then for now, then in zip(moving(pl_module), self.start, strict=True)]
        exact = {
            "asked": list(asked),
            "first_record": report.instance_ids[0],
            "rationale_tokens": int(report.rationale_lengths.sum()),
            "finished": int(report.finished.sum()),
            "update_tokens": report.update_tokens,
        }
        rounded = {
            **{f"reward/{name}": float(term.double().mean()) for name, term in report.reward.terms.items()},
            "reward": float(report.reward.total.double().mean()),
            "reward_within_groups": float(report.reward.total.double().std(dim=1).mean()),
            "advantages": float(report.advantages.double().norm()),
            "grad_norm": report.update["grad_norm"],
            "entropy": report.update["entropy"],
            "moved": float(torch.nn.utils.get_total_norm(moved)),  # how far the weights are from where they began
        }
        self.batches.append({"exact": exact, "rounded": rounded})
        asked.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.write_text(json.dumps(self.batches, indent=2) + "\n", encoding="utf-8")


def moving(module: L.LightningModule) -> list[Tensor]:
    """The weights that training means to move. A softmax does not see the biases of keys: their gradient is 0 but for rounding, of
    which AdamW makes full steps."""
    return [p for name, p in module.named_parameters() if p.requires_grad and not name.endswith("k_proj.bias")]


def trajectory(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What the batches did, from a run of train.py's own `train` on one thread."""
    from train import train

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg: DictConfig = compose("train", overrides=[*OVERRIDES, *overrides])
    with open_dict(cfg):
        cfg.paths.output_dir = str(folder)
        cfg.callbacks.recorder = {"_target_": "tests.golden.Recorder", "path": str(folder / "batches.json")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(cfg)
    finally:
        torch.set_num_threads(threads)
    batches: list[dict[str, Any]] = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    return batches


if __name__ == "__main__":
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        RECORD.write_text(json.dumps(trajectory(Path(temporary)), indent=2) + "\n", encoding="utf-8")
    print(f"recorded to {RECORD}")
