"""The published experiments, trained for two batches on stand-ins of their backbones, with no network."""

from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from tests.datamodules.builders import write_triplets
from train import train

BACKBONES = {
    "qwen1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2"),
    "llama3b": ("meta-llama/Llama-3.2-3B-Instruct", "llama"),
    "qwen3b": ("Qwen/Qwen2.5-3B-Instruct", "qwen2"),
    "qwen3_4b": ("Qwen/Qwen3-4B-Instruct-2507", "qwen3"),
}

EXPERIMENTS = [f"{backbone}_{data}" for backbone in BACKBONES for data in ("sup", "unsup")]

FEW = ["logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=2", "datamodule.batch_size=4"]
SMALL = [
    *(*FEW, "trainer.max_epochs=1", "rollout.max_new_tokens=4", "module.num_generations=2", "algorithm.updates_per_batch=2"),
    "callbacks.metrics.figure_path=null",  # drawing takes longer than the rest
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory):
    """Makes a folder with random weights of an experiment's architecture and the shipped tokenizer."""

    def make(experiment: str) -> str:
        folder = tmp_path_factory.mktemp(experiment)
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments" / "tiny_policy" / "weights")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        torch.manual_seed(0)
        config = AutoConfig.for_model(BACKBONES[experiment.rsplit("_", 1)[0]][1], **sizes, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def own_data(tmp_path: Path) -> dict[str, Path]:
    """A file of triplets and one of sentences."""
    (tmp_path / "sentences.txt").write_text("".join(f"A sentence about {i}.\n" for i in range(12)))
    return {"sup": write_triplets(tmp_path / "triplets.jsonl", 12), "unsup": tmp_path / "sentences.txt"}


def fit(cfg, policy: str | None, metric: str) -> float:
    cfg.policy.path, cfg.paths.cache_dir, cfg.optimized_metric = policy or cfg.policy.path, f"{cfg.paths.output_dir}/cache", metric
    value = train(cfg)
    assert value is not None
    return value


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_published_needs_a_local_policy_and_file(experiment, compose, stand_in, own_data):
    cfg = compose(f"experiment={experiment}", f"datamodule.path={own_data[experiment.rsplit('_', 1)[1]]}", *SMALL)
    assert fit(cfg, stand_in(experiment), "update/updates") == 2


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_published_settings(experiment, compose):
    backbone, data = experiment.rsplit("_", 1)
    cfg = compose(f"experiment={experiment}")
    assert hydra_compose("train", [f"experiment={experiment}"]).policy.path == BACKBONES[backbone][0]
    assert (cfg.module.learning_rate, cfg.module.num_generations, cfg.module.max_prompt_tokens) == (1e-6, 8, 1024)
    assert (cfg.module.temperature, cfg.module.context_temperature) == (1.0, 0.5)
    assert (cfg.rollout.max_new_tokens, cfg.trainer.max_epochs, cfg.datamodule.batch_size) == (2048, 2, 64)
    assert (cfg.algorithm.updates_per_batch, cfg.algorithm.truncation, cfg.algorithm.truncation_size) == (4, "constant", 1.0)
    assert (cfg.algorithm.advantage.std, cfg.algorithm.loss.clip_low, cfg.algorithm.loss.clip_high) == (False, 0.2, 0.2)
    assert (cfg.reward.consistency_weight, cfg.reward.hard_weight, cfg.reward.temperature) == (0.2, 0.2, 0.1)
    assert cfg.reward._target_ == f"src.modules.objectives.rewards.{'paper' if data == 'sup' else 'unsupervised'}"
    assert cfg.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("lora", [[], ["policy/lora=all_linear"]], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["baseline_cl_sup", "baseline_simcse_unsup"])
def test_baseline_needs_a_local_policy_and_file(name, lora, compose, stand_in, own_data):
    data = name.rsplit("_", 1)[1]
    cfg = compose(f"experiment={name}", f"datamodule.path={own_data[data]}", *FEW, *lora)
    assert (cfg.policy.gradient_checkpointing, cfg.trainer.precision, cfg.module.temperature) == (True, "bf16-mixed", 0.05)
    assert 0 < fit(cfg, stand_in(f"qwen1.5b_{data}"), "update/loss") < 10


def test_tiny_unsup_needs_nothing(compose):
    cfg = compose("experiment=tiny_unsup", *SMALL)
    cfg.packages.train = ["urllib3"]
    assert -1 <= fit(cfg, None, "reward/self/mean") <= 1
