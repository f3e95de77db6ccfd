"""An engine a process, and one engine over two processes; each of them has its own prompts."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed
from transformers import Qwen2Config, Qwen2ForCausalLM

from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from tests.builders import small_tokenizer
from tests.conftest import ROOT
from tests.vllm_builders import NEEDS_VLLM, TEXTS, engine, largest_gap, prompts_of, step

pytestmark = [*NEEDS_VLLM, pytest.mark.slow]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes(tensor_parallel: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.modules.rollouts.test_rollout_vllm_processes", str(tensor_parallel)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2


def rank(tensor_parallel: int) -> None:
    """What each of the two processes does."""
    distributed.init_process_group("gloo")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # Lightning's launcher does not set them all
        del os.environ[name]
    tokenizer = small_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True, **shape)
    policy = Policy(Qwen2ForCausalLM(config).eval(), tokenizer)
    own = torch.arange(distributed.get_rank(), len(TEXTS) - 1, 2)
    prompts = prompts_of(policy).select(own[: 2 + distributed.get_rank()])  # not even equally many
    for _ in range(2):
        greedy = engine(tensor_parallel=tensor_parallel).generate(policy, prompts, temperature=0.0)
        assert torch.equal(greedy.input_ids, HFEngine(16).generate(policy, prompts, temperature=0.0).input_ids)
        sampled = engine(tensor_parallel=tensor_parallel).generate(policy, prompts, n=3, seed=distributed.get_rank())
        assert largest_gap(policy, sampled) < 1e-4
        step(policy)
    print("agrees")
    distributed.destroy_process_group()


if __name__ == "__main__":
    rank(int(sys.argv[1]))
