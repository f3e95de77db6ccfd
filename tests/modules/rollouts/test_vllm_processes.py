"""One engine for each of two processes, and one engine over both; each process has its own prompts."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed

from src.modules.rollouts.hf import HFEngine
from tests.conftest import ROOT
from tests.vllm_builders import NEEDS_VLLM, TEXTS, engine, largest_mismatch, prompts_of, random_policy, step

pytestmark = [*NEEDS_VLLM, pytest.mark.slow]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes(tensor_parallel: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "tests.modules.rollouts.test_vllm_processes", str(tensor_parallel)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2


def rank(tensor_parallel: int) -> None:
    """The program of each process."""
    distributed.init_process_group("gloo")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # Lightning's launcher does not set them all
        del os.environ[name]
    policy = random_policy("qwen2", hidden_size=64, num_attention_heads=2)
    own = torch.arange(distributed.get_rank(), len(TEXTS) - 1, 2)
    prompts = prompts_of(policy).select(own[: 2 + distributed.get_rank()])  # not even equally many
    for _ in range(2):
        greedy = engine(tensor_parallel=tensor_parallel).generate(policy, prompts, temperature=0.0)
        assert torch.equal(greedy.input_ids, HFEngine(16).generate(policy, prompts, temperature=0.0).input_ids)
        sampled = engine(tensor_parallel=tensor_parallel).generate(policy, prompts, n=3, seed=distributed.get_rank())
        assert largest_mismatch(policy, sampled) < 1e-4
        step(policy)
    print("agrees")
    distributed.destroy_process_group()


if __name__ == "__main__":
    rank(int(sys.argv[1]))
