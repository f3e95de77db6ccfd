"""`dry_run=true` prints the plan of a run, refuses numbers that do not divide, and loads nothing."""

import re

import pytest
from omegaconf import DictConfig
from transformers import AutoConfig

from src.modules.plan.plan import PlanError, plan, text
from tests.conftest import Compose
from train import train

PUBLISHED = "Qwen/Qwen2.5-1.5B-Instruct"


def planned(compose: Compose, *overrides: str, experiment: str = "qwen1.5b_sup", path: str = PUBLISHED) -> DictConfig:
    """A config to plan."""
    cfg = compose(f"experiment={experiment}", "dry_run=true", *overrides)
    cfg.policy.path = path
    return cfg


def test_batch_and_weights_are_divided(compose):
    one, four, ddp = (
        plan(planned(compose, *settings))
        for settings in ([], ["trainer=fsdp", "trainer.devices=4"], ["trainer=ddp", "trainer.devices=2", "trainer.num_nodes=2"])
    )
    assert one[0].calls() == ((64, 8), (128, 1))
    assert four[0].calls() == ddp[0].calls() == ((16, 8), (32, 1))
    assert four[0].ranks == ddp[0].ranks == 4
    assert "weights                      4 B x 1,543,714,304 / 4" in text(planned(compose, "trainer=fsdp", "trainer.devices=4"))


def test_table_adds_up(compose):
    said = text(planned(compose))
    held = [float(value) for value in re.findall(r"^ +([\d.]+)  (?!together|peak)\S", said, flags=re.MULTILINE)]
    sums = [float(value) for value in re.findall(r"^ +([\d.]+)  together", said, flags=re.MULTILINE)]
    peak = float(re.search(r"([\d.]+)  peak", said)[1])
    assert sum(held) == pytest.approx(sum(sums), abs=0.1)
    assert peak == pytest.approx(sums[0] + max(sums[1:]), abs=0.1)
    assert "64 instances / 1 ranks = 64 each, with K = 8 rollouts and M = 1 negatives" in said


def test_time_on_a_card(compose):
    said = text(planned(compose, "plan.card=h100"))
    parts = [float(value) for value in re.findall(r"^ +([\d.]+)  .* TFLOP", said, flags=re.MULTILINE)]
    total, hours = re.search(
        r"([\d.]+)  together; 1,000 batches \(an example: the data decides\) take at least ([\d.]+) hours", said
    ).groups()
    assert len(parts) == 3
    assert float(total) == pytest.approx(sum(parts), abs=0.02)
    assert float(hours) == pytest.approx(float(total) / 3.6, rel=1e-3)
    assert "; 20 batches (fewer" in text(planned(compose, "plan.card=h200", "trainer.limit_train_batches=10"))
    assert "; 3 batches (fewer" in text(planned(compose, "plan.card=h200", "trainer.limit_train_batches=10", "trainer.max_steps=10"))
    with pytest.raises(PlanError, match=r"plan\.card=v100 is not known"):
        text(planned(compose, "plan.card=v100"))
    assert "plan.card names a card" in text(planned(compose))


def test_adapters_and_a_reference_count(compose):
    _, full = plan(planned(compose))
    work, adapted = plan(planned(compose, "policy/lora=all_linear", "algorithm.kl_coef=0.1"))
    assert adapted.trained == adapted.parameters - full.parameters < 0.05 * full.parameters
    assert work.copies == 0  # the weights beneath the adapters are the reference
    assert plan(planned(compose, "algorithm.kl_coef=0.1"))[0].copies == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=fsdp", "trainer.devices=3"], r"64 instances a batch do not divide by 3 ranks"),
        (["trainer=fsdp", "trainer.devices=32"], r"2 instances a rank do not divide by algorithm\.updates_per_batch=4"),
        (["trainer.devices=4"], r"trainer\.devices=4, .* need trainer=ddp or trainer=fsdp"),
        (["trainer=ddp"], r"trainer\.devices=-1 means all GPUs"),
    ],
)
def test_impossible_divisions_are_refused(overrides, message, compose):
    with pytest.raises(PlanError, match=message):
        plan(planned(compose, *overrides))
    with pytest.raises(SystemExit, match=f"^train.py: {message}"):
        train(planned(compose, *overrides))


def test_other_training_is_refused(compose):
    with pytest.raises(PlanError, match="dry_run plans GRACE training"):
        plan(compose("experiment=tiny_baseline_cl_sup", "dry_run=true"))


def test_dry_run_loads_nothing(compose, tmp_path, tiny_policy_folder, capsys):
    AutoConfig.from_pretrained(tiny_policy_folder).save_pretrained(tmp_path / "config alone")
    cfg = planned(compose, "trainer=cpu_ddp", experiment="tiny_sup", path=str(tmp_path / "config alone"))
    cfg.datamodule.cache_dir = str(tmp_path / "no cache")
    assert train(cfg) is None
    assert "1 node(s) x 2 device(s) = 2, ddp" in capsys.readouterr().out
    assert not (tmp_path / "no cache").exists()
    assert not (tmp_path / "output").exists()
