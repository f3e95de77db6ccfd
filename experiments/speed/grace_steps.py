"""Training steps of GRACE in a process of their own: seconds of each, and the peak of memory above the model's own.

python -m experiments.speed.grace_steps spec.json        (started by `step` and `scaling`; prints one line of JSON)
"""

import argparse
import functools
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from experiments.speed.measuring import peak, reset_peak
from experiments.speed.subject import triplets, unending
from src.modules.encoder.settings import EncoderSettings
from src.modules.grace import GRACE
from src.modules.objectives.advantages import grpo
from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.losses import ppo_clip
from src.modules.objectives.rewards import listwise
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.hf import HFEngine


@dataclass(frozen=True)
class Spec:
    """What the steps do.

    Attributes:
        policy: folder.
        instances, rollouts, new_tokens: B, K, and the length of every rationale.
        micro_batch_tokens: of the update.
        sampled_tokens: whose keys and values are held at once while rationales are written.
        steps: measured ones, after one to warm up.
        train_embeddings: False holds the token embeddings.
        vocab_size: where it is not the policy's own, a model of that vocabulary with random weights takes its place.
        packages: whose docstrings.
    """

    policy: str
    instances: int
    rollouts: int
    new_tokens: int
    micro_batch_tokens: int
    sampled_tokens: int = 2**18
    steps: int = 1
    train_embeddings: bool = True
    vocab_size: int | None = None
    packages: tuple[str, ...] = ("sklearn", "sqlalchemy")

    def save(self, file: Path) -> Path:
        """Writes it as JSON."""
        file.write_text(json.dumps(asdict(self)))
        return file


class Clock(L.Callback):
    """Seconds of every batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def load(spec: Spec) -> Policy:
    """The policy, or one of its shape with another vocabulary; without an end."""
    policy = Policy.load(spec.policy, train_embeddings=spec.train_embeddings)
    if spec.vocab_size is not None:
        policy.model.config.vocab_size = spec.vocab_size
        torch.manual_seed(0)
        model = type(policy.model)(policy.model.config).eval()
        model.get_input_embeddings().requires_grad_(spec.train_embeddings)
        policy.tokenizer.add_tokens([f"<|{i}|>" for i in range(spec.vocab_size - len(policy.tokenizer))])
        policy = Policy(model, policy.tokenizer)
    return unending(policy)


def run(spec: Spec) -> dict[str, Any]:
    """Seconds of the measured steps, and bytes at the peak of all of them above what the loaded model took."""
    policy = load(spec)
    settings = EncoderSettings.load(spec.policy)
    renderer = PromptRenderer(policy.tokenizer, settings.instruction, settings.max_prompt_tokens)
    records = triplets(renderer, (spec.steps + 1) * spec.instances, spec.packages)
    batches = [records[i : i + spec.instances] for i in range(0, len(records), spec.instances)]
    if torch.cuda.is_available():
        policy.to("cuda")
    before = reset_peak()
    module = GRACE(
        policy=policy,
        engine=HFEngine(spec.new_tokens, spec.sampled_tokens),
        reward=functools.partial(listwise, temperature=0.05),
        algorithm=Algorithm(grpo, ppo_clip),
        instruction=settings.instruction,
        max_prompt_tokens=settings.max_prompt_tokens,
        num_generations=spec.rollouts,
        micro_batch_tokens=spec.micro_batch_tokens,
        learning_rate=3e-5,
    )
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="auto", devices=1, max_epochs=1, callbacks=[clock], **quiet)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return {"seconds": clock.seconds[1:], "bytes": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    values = json.loads(parser.parse_args().spec.read_text())
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    result = run(Spec(**{**values, "packages": tuple(values["packages"])}))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
