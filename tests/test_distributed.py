"""One process with B instances and two with B/2 do the same, by DDP and by FSDP; gloo on a CPU."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from src.modules.objectives.rewards import Novelty, document
from src.utils.sharded_strategy import ShardedStrategy
from tests.programs import Programs, free_port
from tests.two_processes import BATCH, SCENARIOS, batches_of, fit

KINDS = ["ddp", "fsdp"]

SIMILARITY = 2e-6
"""How far apart two computations of a cosine in float32 may be: 32 times 2^-24. Ranks sum up in another order than one process, so
after a first step their weights differ by rounding as well."""
GAIN = {"paper": 34, "document": 34, "listwise": 80, "PlackettLuce": 1}
"""What a reward makes of an error in all its cosines: weights of 1 + 2 (one for each negative) + 0.2 + 0.2, divided by 0.1; two terms of
two cosines each, divided by 0.05; an order of sampled rankings, which rounding leaves alone."""


def as_torchrun(rank: int, port: int) -> dict[str, str]:
    """The variables by which torchrun tells each of two processes its place."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    return os.environ | {name: str(number) for name, number in numbers.items()} | texts


@pytest.fixture(scope="module")
def two(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    ranks = [programs.start("-m", "tests.two_processes", str(folder), env=as_torchrun(rank, port)) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(rank.stderr.read_text()[-3000:] for rank in ranks)
    return folder


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    """What one process did."""
    return {name: fit(module(), batches=batches_of(name)) for name, module in SCENARIOS.items()}


def of_two(folder: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{kind}.pt", weights_only=True)
    return found


def gain(reward: Any) -> float:
    """What a reward makes of an error in all its cosines."""
    if isinstance(reward, Novelty):
        return gain(reward.reward) + 10 * reward.novelty_weight
    name = getattr(reward, "__name__", type(reward).__name__)
    assert name in GAIN, f"write into GAIN what {name} makes of an error in all its cosines: its weights divided by its temperature"
    return GAIN[name]


def rounding(name: str) -> float:
    """How far apart two computations of a scenario's rewards may be."""
    return SIMILARITY * gain(SCENARIOS[name]().reward_function)


def of_advantages(name: str, rewards: Tensor) -> float:
    """The same of its advantages: of two rewards, and where they are standardised divided by the deviation, whose own error moves
    advantages in proportion (they are below 4 deviations)."""
    if name != "statistics of the batch":
        return 2 * rounding(name)
    deviation = float((rewards - rewards.mean(dim=1, keepdim=True)).std())
    assert deviation > 0.03  # or the division would let any error pass
    return 2 * rounding(name) / deviation


def close(ours: Tensor, theirs: Tensor, by: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=by, rtol=1e-5)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, name: str, two: Path, one: dict[str, dict[str, Any]]) -> None:
    ours, theirs = of_two(two, kind)[name], one[name]
    for a, b in zip(ours["batches"], theirs["batches"], strict=True):
        assert a["ids"] == b["ids"]
        assert torch.equal(a["lengths"], b["lengths"])  # the same rollouts, drawn by their places in the global batch
        close(a["reward"], b["reward"], rounding(name))
        for role in b["others"]:
            close(a["others"][role], b["others"][role], rounding(name))
        close(a["advantages"], b["advantages"], of_advantages(name, b["reward"]))
        assert a["update"] == pytest.approx(b["update"], rel=1e-4, abs=1e-4)
        assert a["numbers"] == pytest.approx(b["numbers"], abs=1e-5)
        torch.testing.assert_close(torch.tensor(a["mismatch"]), torch.tensor(b["mismatch"]), atol=1e-5, rtol=0, equal_nan=True)
    start = dict(SCENARIOS[name]().policy.named_parameters())
    moved = max(float((weight - start[key]).detach().abs().max()) for key, weight in theirs["weights"].items())
    assert moved > 3e-4  # thirty times what they may differ by
    for key, weight in theirs["weights"].items():
        close(ours["weights"][key], weight)
    close(ours["embeddings"], theirs["embeddings"], by=1e-4)  # of length 6 or so, not normalised


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The length of the difference of two policies' weights."""
    return sum(float((a[name] - b[name]).detach().square().sum()) for name in a) ** 0.5


@pytest.mark.parametrize(("what", "most"), [("bfloat16 sums", 0.02), ("bfloat16 weights", 0.2)])
def test_exchange_in_bfloat16_is_the_same_but_for_rounding(what: str, most: float, two: Path, one: dict[str, dict[str, Any]]) -> None:
    ours, theirs = of_two(two, "fsdp")[what]["weights"], one["several updates"]["weights"]
    start = dict(SCENARIOS["several updates"]().policy.named_parameters())
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    assert 1e-5 < distance(ours, theirs) / distance(theirs, start) < most


def test_weights_gathered_in_bfloat16_need_autocast() -> None:
    with pytest.raises(ValueError, match=r"gather_dtype=bfloat16 needs trainer\.precision=bf16-mixed, not 32-true"):
        fit(SCENARIOS["several updates"](), ShardedStrategy(gather_dtype="bfloat16"))


@pytest.mark.parametrize("name", ["reduce_dtype", "gather_dtype"])
def test_exchanged_dtype_is_a_float(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=float16: it is float32 or bfloat16"):
        ShardedStrategy(**{name: "float16"})


def test_ranks_had_different_tokens(one: dict[str, dict[str, Any]]) -> None:
    lengths = one["several updates"]["batches"][0]["lengths"]
    assert lengths[::2].sum() != lengths[1::2].sum()
    gathered = [batch["update"]["groups"] for batch in one["groups gathered"]["batches"]]
    assert gathered[0] == 0  # nothing is learned while groups are gathered
    assert 0 < gathered[1] < 2 * len(BATCH)


def test_ranks_shared_a_query(one: dict[str, dict[str, Any]]) -> None:
    for name, results in one.items():
        expected = 1 if name == "the same query on two ranks" else 0
        assert [batch["numbers"]["false_negatives"] for batch in results["batches"]] == [expected, expected]


def test_gradient_parts_were_measured(one: dict[str, dict[str, Any]]) -> None:
    for name, measured in {
        "pathwise": [True, True],
        "pathwise, queries learned from": [True, False],
        "pathwise, adapters, positives alone": [True, True],
        "pathwise, a rank without tokens": [True, True],
    }.items():
        updates = [batch["update"] for batch in one[name]["batches"]]
        assert ["gradient_parts_cosine" in update for update in updates] == measured
        assert updates[0]["score_function_grad_norm"] > 1e-2
        assert updates[0]["pathwise_grad_norm"] > 1e-2
        assert abs(updates[0]["gradient_parts_cosine"]) < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_rank_stops_all(kind: str, two: Path) -> None:
    for name, expected in {
        "reward": "reward term 'mine' is not finite in rollout batch 0, records f:1; the weights were not changed",
        "gradient": "gradient norm is nan in rollout batch 0, records f:0, f:2, f:4, f:6, f:1, f:3, f:5, f:7; the weights were not changed",
    }.items():
        lines = [(two / f"{kind} {name} {rank}.txt").read_text() for rank in (0, 1)]
        assert lines[0] == lines[1]
        assert lines[0].startswith(expected)
        assert lines[0].endswith("the same weights: True")


def test_uneven_batches_stop_all(two: Path) -> None:
    for name, expected in {
        "different": "the processes were given different batches, and each takes its share of one itself",
        "uneven": "a batch of 5 instances cannot be shared out evenly over 2 processes: change trainer.devices",
    }.items():
        lines = [(two / f"ddp {name} {rank}.txt").read_text() for rank in (0, 1)]
        assert lines[0] == lines[1]
        assert lines[0].startswith(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_processes_equal_unstopped(kind: str, two: Path) -> None:
    """With dropout and everything else that has a state: tests/test_resume.py."""
    straight, resumed = (of_two(two, kind)[name] for name in ("never stopped", "gone on with"))
    assert (len(straight["batches"]), len(resumed["batches"])) == (2, 1)
    assert torch.equal(straight["batches"][1]["reward"], resumed["batches"][0]["reward"])
    assert straight["weights"].keys() == resumed["weights"].keys()
    for key, weight in straight["weights"].items():
        assert torch.equal(resumed["weights"][key], weight), key


def test_fsdp_resumes_as_ddp(two: Path) -> None:
    ddp, fsdp = (of_two(two, kind)["gone on with"] for kind in KINDS)
    assert len(ddp["batches"]) == len(fsdp["batches"]) == 1
    close(ddp["batches"][0]["reward"], fsdp["batches"][0]["reward"], SIMILARITY * gain(Novelty(document, novelty_weight=1.0)))
    for key, weight in ddp["weights"].items():
        if "k_proj.bias" not in key:  # attention does not depend on it: its gradient is rounding, of which AdamW makes full steps
            torch.testing.assert_close(fsdp["weights"][key], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_export_has_trained_weights(kind: str, two: Path) -> None:
    trained = of_two(two, kind)["gone on with"]["weights"]
    exported = AutoModelForCausalLM.from_pretrained(two / f"{kind}_export", dtype=torch.float32)
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, trained[f"model.{name}"])
    assert sorted(file.name for file in two.iterdir() if ".tmp" in file.name or ".old" in file.name) == []  # one rank wrote
