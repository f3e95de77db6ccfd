"""Memory over a thousand small training steps, with everything that a run keeps: MLflow, checkpoints, tables, diagnostics.

    python -m experiments.soak.soak [--steps 1000] [--output experiments/soak/memory.md]

Also draws the figure, as a PNG beside it. Linux only: it reads a process's account of its memory from /proc.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parents[2]))  # configs/paths reads it

import lightning as L
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from experiments.speed.measuring import machine, report, table
from train import train

ROOT = Path(os.environ["PROJECT_ROOT"])
MIB = 2**20
MEMORY = "memory.txt"


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


class Memory(L.Callback):
    """Writes resident memory after every rollout batch to a file, a line each, in MiB."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, *_: Any) -> None:
        with open(self.file, "a", encoding="utf-8") as lines:
            lines.write(f"{resident():.3f}\n")


def small_policy(folder: Path) -> Path:
    """Random weights, two layers of 32, with the shipped policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments" / "tiny_policy" / "weights")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, steps: int, packages: str) -> DictConfig:
    """The tiny policy's experiment, small, with all its callbacks but those that score tasks."""
    overrides = [
        "experiment=tiny_sup",
        f"policy.path={small_policy(folder / 'policy')}",
        f"packages.train=[{packages}]",
        *("datamodule.modules_per_batch=2", "datamodule.docstrings_per_module=2", "module.num_generations=3", "rollout.max_new_tokens=8"),
        *("callbacks.mteb=null", "callbacks.final_report=null", "callbacks.rationale_table.texts=4", "callbacks.similarities.records=4"),
        *("callbacks.checkpoint.monitor=reward/total/mean", "trainer.accelerator=cpu", f"trainer.limit_train_batches={steps}"),
        f"paths.tracking_uri=sqlite:///{folder}/mlflow.db",
        f"paths.artifact_location=file://{folder}/artifacts",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = compose("train", overrides=overrides)
    OmegaConf.update(cfg, "paths.output_dir", str(folder / "run"))
    OmegaConf.update(cfg, "callbacks.memory", {"_target_": "experiments.soak.soak.Memory", "file": str(folder / MEMORY)}, force_add=True)
    return cfg


def soak(steps: int, packages: str) -> tuple[list[float], int]:
    """MiB after every step, and the bytes of the checkpoints in the end."""
    with tempfile.TemporaryDirectory() as folder:
        train(settings(Path(folder), steps, packages))
        samples = [float(line) for line in Path(folder, MEMORY).read_text(encoding="utf-8").splitlines()]
        checkpoints = [path for path in Path(folder, "run", "checkpoints").iterdir() if not path.is_symlink()]
        return samples, sum(file.stat().st_size for path in checkpoints for file in path.iterdir())


def growth(samples: list[float]) -> float:
    """MiB a thousand steps: the slope through the second half, when everything has been met once."""
    half = len(samples) // 2
    line = statistics.linear_regression(range(half, len(samples)), samples[half:])
    return 1000 * line.slope


def draw(samples: list[float], file: Path) -> None:
    """Memory over steps, from zero, so that a slope is seen for what it is."""
    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(7, 3.2), dpi=120, layout="constrained")
    axis.plot(range(1, len(samples) + 1), samples, linewidth=1)
    axis.set_ylim(0, 1.15 * max(samples))
    axis.set_xlabel("rollout batch")
    axis.set_ylabel("resident memory, MiB")
    axis.grid(alpha=0.3)
    figure.savefig(file)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--packages", default="urllib3", help="whose docstrings are the texts")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("memory.md"))
    options = parser.parse_args(arguments)
    samples, checkpoints = soak(options.steps, options.packages)
    places = sorted({0, len(samples) // 10, len(samples) // 2, len(samples) - 1})
    rows = [[f"after step {place + 1}", f"{samples[place]:.1f} MiB"] for place in places]
    rows += [
        ["growth over the second half, a thousand steps", f"{growth(samples):+.2f} MiB"],
        ["checkpoints", f"{checkpoints / MIB:.1f} MiB"],
    ]
    draw(samples, options.output.with_suffix(".png"))
    report(f"# Memory over {len(samples)} steps\n\n{machine()}\n\n{table(['', ''], rows)}", options.output)


if __name__ == "__main__":
    main()
