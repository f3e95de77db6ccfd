"""The experiments that people will type, trained for two batches on stand-ins of their backbones, with no network."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import ROOT, Compose
from train import train

BACKBONES: dict[str, tuple[str, type, type[PreTrainedModel]]] = {
    "qwen1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", Qwen2Config, Qwen2ForCausalLM),
    "llama3b": ("meta-llama/Llama-3.2-3B-Instruct", LlamaConfig, LlamaForCausalLM),
    "qwen3b": ("Qwen/Qwen2.5-3B-Instruct", Qwen2Config, Qwen2ForCausalLM),
    "qwen3_4b": ("Qwen/Qwen3-4B-Instruct-2507", Qwen3Config, Qwen3ForCausalLM),
}

EXPERIMENTS = [f"{backbone}_{data}" for backbone in BACKBONES for data in ("sup", "unsup")]

SMALL = [
    *("logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=2", "trainer.max_epochs=1"),
    *("rollout.max_new_tokens=4", "module.num_generations=2", "datamodule.batch_size=4", "algorithm.updates_per_batch=2"),
    "callbacks.metrics.figure_path=null",  # drawing takes longer than the rest
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory):
    """Makes a folder with random weights of an experiment's architecture and the shipped tokenizer."""

    def make(experiment: str) -> Path:
        _, config, model = BACKBONES[experiment.rsplit("_", 1)[0]]
        folder = tmp_path_factory.mktemp(experiment)
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments" / "tiny_policy" / "weights")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        model(
            config(**sizes, head_dim=8, vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=4096)
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def own_data(tmp_path: Path) -> dict[str, Path]:
    """A file of triplets and one of sentences."""
    rows = [{"query": f"query {i}", "positive": f"a document about {i}", "negative": [f"another {i}"]} for i in range(12)]
    (tmp_path / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sentences.txt").write_text("".join(f"A sentence about {i}.\n" for i in range(12)))
    return {"sup": tmp_path / "triplets.jsonl", "unsup": tmp_path / "sentences.txt"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_local_policy_and_a_local_file_are_all_that_is_needed(experiment: str, compose: Compose, stand_in, own_data) -> None:
    cfg = compose(f"experiment={experiment}", f"datamodule.path={own_data[experiment.rsplit('_', 1)[1]]}", *SMALL)
    cfg.policy.path = str(stand_in(experiment))
    cfg.paths.cache_dir = f"{cfg.paths.output_dir}/cache"
    cfg.optimized_metric = "update/updates"
    assert train(cfg) == 2


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_published_settings(experiment: str, compose: Compose) -> None:
    from hydra import compose as plain

    backbone, data = experiment.rsplit("_", 1)
    cfg = compose(f"experiment={experiment}")
    assert plain("train", [f"experiment={experiment}"]).policy.path == BACKBONES[backbone][0]
    assert cfg.name == experiment
    assert (cfg.module.learning_rate, cfg.module.num_generations, cfg.module.max_prompt_tokens) == (1e-6, 8, 1024)
    assert (cfg.module.temperature, cfg.module.context_temperature) == (1.0, 0.5)
    assert (cfg.rollout.max_new_tokens, cfg.trainer.max_epochs, cfg.datamodule.batch_size) == (2048, 2, 64)
    assert (cfg.algorithm.updates_per_batch, cfg.algorithm.truncation, cfg.algorithm.truncation_size) == (4, "constant", 1.0)
    assert (cfg.algorithm.advantage.std, cfg.algorithm.loss.clip_low, cfg.algorithm.loss.clip_high) == (False, 0.2, 0.2)
    assert (cfg.reward.consistency_weight, cfg.reward.hard_weight, cfg.reward.temperature) == (0.2, 0.2, 0.1)
    assert cfg.reward._target_ == f"src.modules.objectives.rewards.{'paper' if data == 'sup' else 'unsupervised'}"


BASELINE_SMALL = ["logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=2"]


@pytest.mark.parametrize("data", ["sup", "unsup"])
@pytest.mark.parametrize("lora", [[], ["policy/lora=all_linear"]])
def test_a_baseline_needs_no_more_than_that(data: str, lora: list[str], compose: Compose, stand_in, own_data) -> None:
    name = {"sup": "baseline_cl_sup", "unsup": "baseline_simcse_unsup"}[data]
    cfg = compose(f"experiment={name}", f"datamodule.path={own_data[data]}", "datamodule.batch_size=4", *BASELINE_SMALL, *lora)
    assert (cfg.policy.gradient_checkpointing, cfg.trainer.precision, cfg.module.temperature) == (True, "bf16-mixed", 0.05)
    cfg.policy.path = str(stand_in(f"qwen1.5b_{data}"))
    cfg.paths.cache_dir = f"{cfg.paths.output_dir}/cache"
    cfg.optimized_metric = "update/loss"
    loss = train(cfg)
    assert loss is not None
    assert 0 < loss < 10


def test_lengths_of_rationales_are_one_setting(compose: Compose) -> None:
    assert compose("experiment=qwen3b_sup", "rollout.max_new_tokens=256", "reward=listwise").rollout.max_new_tokens == 256


def test_without_a_network_an_experiment_fails_in_a_line_that_says_what_to_give(compose: Compose, stand_in) -> None:
    cfg = compose("experiment=qwen3b_unsup", *SMALL)
    cfg.policy.path = str(stand_in("qwen3b_unsup"))
    with pytest.raises(
        FileNotFoundError, match=r"no data at 'princeton-nlp/datasets-for-simcse'.*datamodule\.path=<local file or folder>$"
    ):
        train(cfg)


def test_tiny_unsup_needs_nothing(compose: Compose) -> None:
    cfg = compose("experiment=tiny_unsup", *SMALL)
    cfg.packages.train = ["urllib3"]
    cfg.paths.cache_dir = f"{cfg.paths.output_dir}/cache"
    cfg.optimized_metric = "reward/self/mean"
    reward = train(cfg)
    assert reward is not None
    assert -1 <= reward <= 1
