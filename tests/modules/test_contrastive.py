"""The baselines' module in real fits of the small policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.metrics import batch_metrics
from src.modules.contrastive import Contrastive
from src.modules.encoder.export import load_policy
from src.modules.objectives.info_nce import info_nce
from src.modules.objectives.pairs import supervised
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from src.modules.training.finite import NonFiniteError
from src.records import Triplet
from tests.builders import TRIPLETS, fit, flat, off, small_policy, trained, weights


def make(policy: Policy | None = None, **settings: Any) -> Contrastive:
    settings = {"learning_rate": 1e-3, "max_prompt_tokens": 100, "max_grad_norm": 1e9, **settings}
    return Contrastive(policy or small_policy(), HFEngine(4), "Name the terms.", **settings)


@pytest.mark.parametrize("tokens", [1, 100, 200])
def test_step_gradient_is_that_of_one_graph(tokens: int) -> None:
    module, reference, pairs = make(micro_batch_tokens=tokens), make(), supervised(TRIPLETS)
    watch = fit(module)
    queries, documents = reference.policy.train().embed(reference.sequences(pairs.texts)).split([len(pairs.queries), len(pairs.documents)])
    loss = info_nce(queries, documents, pairs.own, 0.05)
    loss.backward()
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert off(watch.gradients[0], flat(trained(reference.policy))) < 1e-4


@pytest.mark.parametrize("pairs", ["supervised", "dropout"])
def test_equal_texts_are_counted_and_logged(pairs: str) -> None:
    twin = replace(TRIPLETS[0], id="twin", query="Another query of the first document.")
    policy = small_policy(attention_dropout=0.2)
    for batch, expected in (([*TRIPLETS, twin], 1.0), (TRIPLETS, 0.0)):
        report = fit(make(policy, pairs=pairs), [batch]).reports[0]
        assert batch_metrics(report)["contrastive/false_negatives"] == expected


def test_training_tells_pairs_apart() -> None:
    module = make(learning_rate=3e-3)
    fit(module, [TRIPLETS] * 15)
    assert module.rollout_batches == 15
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["loss"] < 0.1
    assert module.batch_metrics.accuracy == 1.0  # type: ignore[attr-defined]
    assert module.batch_metrics.positive_similarity > module.batch_metrics.unrelated_similarity  # type: ignore[attr-defined]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pairs", ["supervised", "dropout"])
def test_adapters_alone_are_trained(tiny_policy_folder: Path, checkpointing: bool, pairs: str) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
    policy = Policy.load(str(tiny_policy_folder), lora=lora, gradient_checkpointing=checkpointing)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    watch = fit(make(policy, pairs=pairs, micro_batch_tokens=100), [TRIPLETS] * 2)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert watch.reports[-1].update["grad_norm"] > 0


def test_bfloat16_trains_float32_weights() -> None:
    module = make(micro_batch_tokens=100)
    assert fit(module, [TRIPLETS] * 2, precision="bf16-mixed").reports[-1].update["grad_norm"] > 0
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("interrupted")


def test_resumed_run_has_the_same_dropout(tiny_policy_folder: Path, tmp_path: Path) -> None:
    def module() -> Contrastive:
        return make(Policy.load(str(tiny_policy_folder), attention_dropout=0.2), pairs="dropout", warmup_steps=3)

    def checkpoints() -> RolloutCheckpoint:
        return RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=2)

    straight, stopped, resumed = module(), module(), module()
    fit(straight, [TRIPLETS] * 5)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(stopped, [TRIPLETS] * 5, checkpoints(), Interrupt(), enable_checkpointing=True)
    path = str(tmp_path / "c" / "last.ckpt")
    loaded, settings = load_policy(path)
    fit(resumed, [TRIPLETS] * 5, checkpoints(), ckpt_path=path, enable_checkpointing=True)
    assert resumed.rollout_batches == straight.rollout_batches == 5
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), weights(straight))  # of the second batch
    assert settings == straight.settings
    assert settings.rationale == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"module.temperature=0.0: it must be above 0"),
        ({"micro_batch_tokens": 0}, r"module.micro_batch_tokens=0"),
        ({"pairs": "triplets"}, r"module.pairs='triplets' does not exist; it is supervised or dropout"),
        ({"policy": small_policy("frozen")}, r"policy.encoder=frozen"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("pairs", ["supervised", "dropout"])
def test_batch_of_one_document(pairs: str) -> None:
    alone = Triplet("file.jsonl:7", "a query", "a document")
    module = make(small_policy(attention_dropout=0.2), pairs=pairs)
    before = weights(module)
    with pytest.raises(ValueError, match=r"^a batch with one document, that of file\.jsonl:7, .*datamodule\.batch_size") as caught:
        fit(module, [[alone]])
    assert "\n" not in str(caught.value)
    assert torch.equal(before, weights(module))
    assert fit(make(), [TRIPLETS[:1]]).reports[0].update["loss"] > 0  # it has a hard negative


def test_dropout_pairs_need_dropout() -> None:
    with pytest.raises(ValueError, match=r"^module.pairs=dropout: both views of a text are the same.*policy.attention_dropout") as caught:
        fit(make(pairs="dropout"))
    assert "\n" not in str(caught.value)


def test_non_finite_loss_spares_weights() -> None:
    module = make()
    with torch.no_grad():
        module.policy.model.model.norm.weight[0] = torch.inf
    before = weights(module)
    with pytest.raises(NonFiniteError, match=r"the loss is nan in batch 0, records file\.jsonl:0, file"):
        fit(module)
    assert torch.equal(before, weights(module))
