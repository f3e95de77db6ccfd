"""The baselines' module in real fits of the small policy."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from src.callbacks.checkpoint import RolloutCheckpoint
from src.modules.contrastive import Contrastive
from src.modules.encoder.export import load_policy
from src.modules.objectives.info_nce import info_nce
from src.modules.objectives.pairs import supervised
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine
from src.modules.training.finite import NonFiniteError
from src.records import Triplet
from tests.builders import SENTENCES, small_policy

TRIPLETS = [
    Triplet(f"file.jsonl:{i}", SENTENCES[i][:20], SENTENCES[i], (SENTENCES[(i + 1) % len(SENTENCES)],)) for i in range(len(SENTENCES))
]


def make(policy: Policy | None = None, **settings: Any) -> Contrastive:
    settings = {"learning_rate": 1e-3, "max_prompt_tokens": 100, "max_grad_norm": 1e9, **settings}
    return Contrastive(policy or small_policy(), HFEngine(4), "Name the terms.", **settings)


class Gradients(L.Callback):
    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


def fit(module: Contrastive, batches: list[list[Triplet]], *callbacks: L.Callback, **settings: Any) -> Contrastive:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, RolloutCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{k: v for k, v in settings.items() if k != "ckpt_path"},
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=settings.get("ckpt_path"))  # type: ignore[arg-type]
    return module


def weights(module: Contrastive) -> list[Tensor]:
    return [p.detach().clone() for p in module.policy.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", [1, 100, 200])
def test_a_step_with_cached_gradients_is_that_of_one_graph(tokens: int) -> None:
    gradients, module = Gradients(), make(micro_batch_tokens=tokens)
    fit(module, [TRIPLETS], gradients)
    reference = make()
    pairs = supervised(TRIPLETS)
    queries, documents = reference.policy.train().embed(reference.sequences(pairs.texts)).split([len(pairs.queries), len(pairs.documents)])
    loss = info_nce(queries, documents, pairs.own, 0.05)
    loss.backward()
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = [p.grad for p in reference.policy.parameters() if p.grad is not None]
    largest = max(float(g.abs().max()) for g in expected)
    for ours, theirs in zip(gradients.seen[0], expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, largest)


def test_training_tells_pairs_apart() -> None:
    module = fit(make(learning_rate=3e-3), [TRIPLETS] * 15)
    assert module.rollout_batches == 15
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["loss"] < 0.1
    assert module.batch_metrics.accuracy == 1.0  # type: ignore[attr-defined]
    assert module.batch_metrics.positive_similarity > module.batch_metrics.unrelated_similarity  # type: ignore[attr-defined]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pairs", ["supervised", "dropout"])
def test_adapters_are_trained_and_nothing_else(tiny_policy_folder: Path, checkpointing: bool, pairs: str) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
    policy = Policy.load(str(tiny_policy_folder), lora=lora, gradient_checkpointing=checkpointing)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    module = fit(make(policy, pairs=pairs, micro_batch_tokens=100), [TRIPLETS] * 2)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["grad_norm"] > 0


def test_gradient_checkpointing_changes_no_gradient(tiny_policy_folder: Path) -> None:
    seen = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        gradients = Gradients()
        policy = Policy.load(str(tiny_policy_folder), gradient_checkpointing=checkpointing, attention_dropout=0.2)
        fit(make(policy, pairs="dropout", micro_batch_tokens=100), [TRIPLETS], gradients)
        seen.append(gradients.seen[0])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_bfloat16_arithmetic_trains() -> None:
    module = fit(make(micro_batch_tokens=100), [TRIPLETS] * 2, precision="bf16-mixed")
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["grad_norm"] > 0
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("interrupted")


def test_a_resumed_run_walks_the_same_way_dropout_included(tiny_policy_folder: Path, tmp_path: Path) -> None:
    def module() -> Contrastive:
        return make(Policy.load(str(tiny_policy_folder), attention_dropout=0.2), pairs="dropout", warmup_steps=3)

    def checkpoints() -> RolloutCheckpoint:
        return RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=2)

    straight, resumed = fit(module(), [TRIPLETS] * 5, RolloutCheckpoint(str(tmp_path / "other"))), module()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(module(), [TRIPLETS] * 5, checkpoints(), Interrupt())
    loaded, settings = load_policy(tmp_path / "c" / "last.ckpt")
    fit(resumed, [TRIPLETS] * 5, checkpoints(), ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert resumed.rollout_batches == straight.rollout_batches == 5
    assert same(weights(resumed), weights(straight))
    assert not same([p.detach() for p in loaded.parameters()], weights(straight))  # of the second batch
    assert settings == straight.settings
    assert not settings.rationale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"module.temperature=0.0: it must be above 0"),
        ({"micro_batch_tokens": 0}, r"module.micro_batch_tokens=0"),
        ({"pairs": "triplets"}, r"module.pairs='triplets' does not exist; it is supervised or dropout"),
        ({"policy": small_policy("frozen")}, r"policy.encoder=frozen"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("pairs", ["supervised", "dropout"])
def test_a_batch_of_one_is_refused_where_there_is_nothing_to_tell_it_from(pairs: str) -> None:
    alone = Triplet("file.jsonl:7", "a query", "a document")
    module = make(small_policy(attention_dropout=0.2), pairs=pairs)
    before = weights(module)
    with pytest.raises(ValueError, match=r"^a batch with one document, that of file\.jsonl:7, .*datamodule\.batch_size") as caught:
        fit(module, [[alone]])
    assert "\n" not in str(caught.value)
    assert same(before, weights(module))


def test_a_batch_of_one_with_a_hard_negative_trains() -> None:
    module = fit(make(), [TRIPLETS[:1]])
    assert module.batch_metrics is not None
    assert module.batch_metrics.update["loss"] > 0


def test_two_views_without_dropout_are_refused_before_anything_else() -> None:
    with pytest.raises(ValueError, match=r"^module.pairs=dropout: both views of a text are the same.*policy.attention_dropout") as caught:
        fit(make(pairs="dropout"), [TRIPLETS])
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    module = make()
    with torch.no_grad():
        module.policy.model.model.norm.weight[0] = torch.inf
    before = weights(module)
    with pytest.raises(NonFiniteError, match=r"the loss is nan in batch 0, records file\.jsonl:0, file"):
        fit(module, [TRIPLETS])
    assert same(before, weights(module))
