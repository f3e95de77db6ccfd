from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from experiments.tiny_policy.cold_start import ColdStartModule
from experiments.tiny_policy.demonstrations import Demonstration, write_rationale
from tests.builders import SENTENCES, small_policy


def demonstrations() -> list[Demonstration]:
    pairs = [(text[:20].rsplit(" ", 1)[0], text) for text in SENTENCES]
    return [Demonstration(q, d, write_rationale(q.split()[:2], q), write_rationale(d.split()[2:5], q)) for q, d in pairs]


def module(**settings: float) -> ColdStartModule:
    return ColdStartModule(small_policy(), "Name the terms.", max_prompt_tokens=96, max_rationale_tokens=40, **settings)  # type: ignore[arg-type]


def test_sequences_hold_the_rationale_and_its_end() -> None:
    cold_start = module()
    rollouts = cold_start.sequences(["One text"], ["<think> a, b</think> sum"])
    assert rollouts.input_ids.shape[1] % 32 == 0
    assert cold_start.policy.tokenizer.decode(rollouts.rationales()[0]) == "<think> a, b</think> sum<|im_end|>"


def test_every_second_row_is_pooled_without_the_summary() -> None:
    cold_start = module()
    rollouts = cold_start.sequences(["One text", "One text"], ["<think> a</think> sum"] * 2)
    hidden = torch.nn.functional.one_hot(rollouts.input_ids, len(cold_start.policy.tokenizer)).float()
    plain, pooled = cold_start.pooled(rollouts, hidden)
    eos = cold_start.policy.tokenizer.eos_token_id
    ends = (rollouts.input_ids[0] == eos).sum()
    assert torch.equal(plain[0], plain[1])
    assert torch.count_nonzero(pooled[0]) < torch.count_nonzero(pooled[1])
    assert ends == 3  # two turns of the prompt, and the rationale's own
    assert pooled[0][eos] > 0  # the end of the user's turn is pooled in both


def test_losses_are_finite_and_reach_every_parameter() -> None:
    cold_start = module()
    parts = cold_start.losses(demonstrations())
    assert all(value.isfinite() for value in parts.values())
    sum(parts[name] for name in ("text", "query_rationale", "document_rationale", "nce", "nce_rationale")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in cold_start.policy.parameters())


def test_a_short_fit_lowers_every_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # two steps of copying alone first: the way the default begins
    cold_start, batch = module(learning_rate=3e-3, warmup_steps=2, copy_steps=2), demonstrations()
    with torch.no_grad():
        before = cold_start.losses(batch)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(cold_start, DataLoader([batch] * 40, batch_size=None))  # type: ignore[arg-type]
    with torch.no_grad():
        after = cold_start.losses(batch)
    assert trainer.global_step == 40
    for name in ("text", "query_rationale", "document_rationale", "nce", "nce_rationale"):
        assert after[name] < 0.9 * before[name], name


def test_copying_is_the_cross_entropy_of_what_was_said_before() -> None:
    cold_start = module()
    vocabulary = len(cold_start.policy.tokenizer)
    torch.manual_seed(0)
    loss = cold_start.copying_loss(rows=3, tokens=5)
    torch.manual_seed(0)
    first = torch.randint(vocabulary, (3, 5))
    logits = cold_start.policy.model(input_ids=torch.cat([first, first], dim=1)).logits
    expected = [-logits[row, 4 + t].log_softmax(-1)[first[row, t]] for row in range(3) for t in range(5)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
