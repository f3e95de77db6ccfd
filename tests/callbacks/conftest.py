"""A real fit of a few batches on a handful of triplets, with the callbacks that a test is about."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from experiments.tiny_policy.policy import TINY_INSTRUCTION
from src.callbacks.monitoring import as_policy_module
from src.modules.contrastive import Contrastive
from src.modules.grace import GRACE, Algorithm
from src.modules.objectives import advantages, losses, rewards
from src.modules.policy.model import Policy
from src.modules.policy_module import PolicyModule
from src.modules.rollouts.hf import HFEngine
from src.records import Triplet
from src.utils.checkpoint_io import FolderCheckpoints
from src.utils.run_logger import RunLogger
from tests.conftest import SENTENCES


def triplets(count: int) -> list[Triplet]:
    """Returns `count` triplets of the sentences, at most eight."""
    s = SENTENCES
    return [Triplet(f"t{i}", s[i], s[i + 2], (s[i + 4],)) for i in range(min(count, 8))]


class FewTriplets(L.LightningDataModule):
    """Batches of two triplets."""

    batch_size = 2

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        return DataLoader([triplets(2)] * self.batches, batch_size=None)

    def fixed_triplets(self, count: int) -> list[Triplet]:
        return triplets(count)


class Interrupt(L.Callback):
    """Ends training before rollout batch `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int) -> None:
        if as_policy_module(pl_module).rollout_batches == self.at:
            raise RuntimeError("interrupted")


@pytest.fixture
def module(tiny_policy: Policy) -> GRACE:
    return make_module(tiny_policy)


@pytest.fixture
def fresh_module(tiny_policy_folder: Path) -> Callable[[], GRACE]:
    """Makes a module of the same starting policy at each call."""
    return lambda: make_module(Policy.load(str(tiny_policy_folder)))


def make_module(policy: Policy, reward: Callable[..., rewards.Reward] = rewards.document) -> GRACE:
    """K = 3, rationales of at most 8 tokens, one update a rollout batch, at a rate that moves the policy."""
    return GRACE(
        policy,
        HFEngine(max_new_tokens=8),
        partial(reward),
        Algorithm(partial(advantages.grpo), partial(losses.ppo_clip), updates_per_batch=1),
        instruction=TINY_INSTRUCTION,
        max_prompt_tokens=96,
        num_generations=3,
        learning_rate=1e-2,
    )


def make_contrastive(policy: Policy) -> Contrastive:
    return Contrastive(policy, HFEngine(max_new_tokens=8), TINY_INSTRUCTION, max_prompt_tokens=96, learning_rate=1e-2)


def fit(
    module: PolicyModule,
    callbacks: Sequence[L.Callback],
    folder: Path,
    batches: int = 2,
    logger: Logger | None = None,
    ckpt_path: str | Path | None = None,
) -> L.Trainer:
    """Fits `batches` rollout batches, from what `ckpt_path` points to; files go below `folder`."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=batches,
        log_every_n_steps=1,
        logger=logger or False,
        callbacks=list(callbacks),
        plugins=[FolderCheckpoints()],
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, L.pytorch.callbacks.ProgressBar) for c in callbacks),
    )
    trainer.fit(module, datamodule=FewTriplets(batches), ckpt_path=ckpt_path and str(Path(ckpt_path).resolve()))
    return trainer


@pytest.fixture
def mlflow_logger(tracking_uri: str, tmp_path: Path) -> RunLogger:
    """A new run in the session's store; its artifacts go below tmp_path."""
    return RunLogger(tmp_path.name, tracking_uri=tracking_uri, artifact_location=f"file://{tmp_path}/mlartifacts")


def steps(logger: RunLogger, metric: str) -> list[int]:
    """Steps at which a metric was logged."""
    return [point.step for point in logger.experiment.get_metric_history(logger.run_id, metric)]


def artifacts(logger: RunLogger, folder: str) -> set[str]:
    """Names of the files of an artifact folder."""
    return {Path(file.path).name for file in logger.experiment.list_artifacts(logger.run_id, folder)}
