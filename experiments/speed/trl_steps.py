"""Training steps of TRL's GRPOTrainer, doing what `grace_steps` does; runs in TRL's own environment.

.venv-trl/bin/python -m experiments.speed.trl_steps spec.json        (started by `step`; prints one line of JSON)
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.speed.measuring import peak, reset_peak
from experiments.speed.trl_reward import ListwiseReward
from src.modules.prompt.renderer import PromptRenderer


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def settings(spec: dict[str, Any], folder: str) -> GRPOConfig:
    """GRPO as GRACE has it; what costs time or memory without need is off."""
    sequences = spec["instances"] * spec["rollouts"]
    micro_batch = spec["instances_per_micro_batch"] * spec["rollouts"]
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        tf32=False if torch.cuda.is_available() else None,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=sequences // micro_batch,
        num_generations=spec["rollouts"],
        max_completion_length=spec["new_tokens"],
        max_steps=spec["steps"] + 1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        loss_type="dapo",  # the token mean over the whole batch
        scale_rewards="none",
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch",
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the measured steps, and bytes at the peak of all of them above what the loaded model took."""
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
    model = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    before = reset_peak()
    renderer = PromptRenderer(tokenizer, spec["instruction"], spec["max_prompt_tokens"])
    reward = ListwiseReward(model, renderer, spec["new_tokens"], spec["rollouts"], spec["encode_batch_size"])
    system = {"role": "system", "content": spec["instruction"]}
    records = [{**record, "prompt": [system, {"role": "user", "content": record["document"]}]} for record in spec["records"]]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=settings(spec, folder),
            train_dataset=Dataset.from_list(records),
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds[1:], "bytes": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    result = run(json.loads(parser.parse_args().spec.read_text()))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
