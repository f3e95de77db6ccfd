"""The benchmarks run at small sizes and measure what they name."""

import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.speed import evaluation, gpu, rollouts, scaling, step
from experiments.speed.grace_steps import Spec, run
from experiments.speed.measuring import MIB, alternating, paired_ratio, peak, reset_peak, table
from experiments.speed.subject import POLICY, ROOT, unending_policy
from experiments.speed.trl_reward import ListwiseReward
from src.modules.rollouts.hf import HFEngine

TRL = ROOT / ".venv-trl" / "bin" / "python"
FEW = ["--repeats", "1", "--packages", "joblib"]


def test_rounds_alternate_and_ratios_are_of_pairs():
    order = []
    seconds = alternating({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert [len(own) for own in seconds.values()] == [3, 3]
    assert paired_ratio([2, 9, 30], [1, 3, 10]) == 3


def test_table_is_markdown():
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads Linux's account of a process")
def test_peak_memory_since_reset():
    def growth(allocate: Callable[[], object]) -> int:
        before = reset_peak()
        allocate()
        return peak() - before

    torch.ones(64 * MIB)
    if growth(lambda: mmap.mmap(-1, 64 * MIB).write(bytes(64 * MIB))) < 60 * MIB:
        pytest.skip("this kernel does not count the peak of a process, or takes other pages of it meanwhile")
    found = [growth(lambda: torch.ones(16 * MIB)) for _ in range(3)]  # meanwhile a busy kernel may take other pages
    assert any(60 * MIB < one < 120 * MIB for one in found), found


def test_no_rationale_ends_before_its_limit():
    policy, renderer = unending_policy()
    written = HFEngine(7).generate(policy, renderer(["one text", "another"]), n=3)
    assert not written.finished.any()
    assert (written.rationale_lengths == 7).all()


def test_trl_reward_sees_our_embeddings():
    policy, renderer = unending_policy()
    documents, queries = ["a sorted copy of the list", "the edges of a graph"], ["sort a list", "graph edges"]
    written = HFEngine(5).generate(policy, renderer(documents), n=3)
    reward = ListwiseReward(policy.model, renderer, new_tokens=5, rollouts=3, batch_size=4)
    repeated = [[text for text in texts for _ in range(3)] for texts in (documents, queries, documents[::-1])]
    values = reward([ids.tolist() for ids in written.rationales()], *repeated)
    assert len(values) == 6
    assert len(set(values)) > 1
    embedded = reward._embed(renderer(documents).repeat(3), written.rationales())
    torch.testing.assert_close(embedded, written.embeddings, rtol=0, atol=1e-4)


def run_benchmark(main: Callable[[list[str]], None], folder: Path, *options: str) -> str:
    """Runs a benchmark at small sizes; returns its table."""
    main([*options, *FEW, "--output", str(folder / "table.md")])
    return (folder / "table.md").read_text()


@pytest.mark.slow
def test_rollouts(tmp_path):
    text = run_benchmark(rollouts.main, tmp_path, "--prompts", "3", "--new-tokens", "4", "--rollouts", "1", "2")
    assert text.count("| transformers generate |") == text.count("| transformers continuous batching |") == 2
    assert "GFLOP/s take" in text


def test_evaluation(tmp_path):
    text = run_benchmark(evaluation.main, tmp_path, "--texts", "6", "--batch-size", "4")
    assert "| generate, decode, encode |" in text
    assert float(text.split("embeddings ")[1].split()[0]) > 0.99


def test_steps_of_a_model_with_another_vocabulary():
    spec = Spec(str(POLICY), 2, 2, 3, 256, steps=1, train_embeddings=False, vocab_size=5000, packages=("joblib",))
    result = run(spec)
    assert len(result["seconds"]) == 1
    assert result["bytes"] < 1024 * MIB  # 0 or less where the step lives on memory that the warm-up freed


@pytest.mark.slow
def test_scaling(tmp_path):
    sizes = ["--instances", "2", "--rollouts", "2", "--new-tokens", "3", "--doublings", "0"]
    assert run_benchmark(scaling.main, tmp_path, *sizes).count("\n| ") >= len(scaling.WAYS)
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(not TRL.exists(), reason="needs TRL in .venv-trl, see experiments/speed/README.md")
def test_step_against_trl(tmp_path):
    sizes = ["--instances", "4", "--rollouts", "2", "--new-tokens", "4", "--instances-per-micro-batch", "2"]
    assert "| TRL GRPOTrainer |" in run_benchmark(step.main, tmp_path, *sizes)


def test_without_trl_the_error_names_its_requirements(capsys, tmp_path):
    with pytest.raises(SystemExit):
        step.main(["--trl-python", str(tmp_path / "python")])
    assert "pip install -r experiments/speed/trl-requirements.txt" in capsys.readouterr().err


def test_gpu_benchmark_of_a_small_shape(tmp_path, capsys):
    gpu.main(["--small", "--packages", "joblib", "--output", str(tmp_path / "gpu.md")])
    rows = [line.split(" | ") for line in (tmp_path / "gpu.md").read_text().splitlines() if "/s |" in line]
    names = [row[0].removeprefix("| ").split(",")[0] for row in rows]
    engines = ["rollout=hf", "transformers generate"] * 2
    assert names == [*engines, "embedding 16 texts", "first update", "update", "update", "a step"]
    assert all(float(row[-1].removesuffix(" |")) > 1 for row in rows)  # nothing is faster than the floor
    assert "measured in" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_benchmark_wants_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU here: --small measures a tiny shape on the CPU" in capsys.readouterr().err
