import lightning as L
import torch
from torch.utils.data import DataLoader

from experiments.tiny_policy.cold_start import ColdStartModule
from experiments.tiny_policy.demonstrations import Demonstration, write_rationale
from src.modules.encoder.export import load_policy
from tests.builders import SENTENCES, small_policy

LOSSES = ("text", "query_rationale", "document_rationale", "nce", "nce_rationale")


def demonstrations() -> list[Demonstration]:
    pairs = [(text[:20].rsplit(" ", 1)[0], text) for text in SENTENCES]
    return [Demonstration(q, d, write_rationale(q.split()[:2], q), write_rationale(d.split()[2:5], q)) for q, d in pairs]


def module(**settings: float) -> ColdStartModule:
    return ColdStartModule(small_policy(), "Name the terms.", max_prompt_tokens=96, max_rationale_tokens=40, **settings)


def test_sequences_hold_the_rationale_and_its_end():
    cold_start = module()
    rollouts = cold_start.sequences(["One text"], ["<think> a, b</think> sum"])
    assert rollouts.input_ids.shape[1] % 32 == 0
    assert cold_start.policy.tokenizer.decode(rollouts.rationales()[0]) == "<think> a, b</think> sum<|im_end|>"


def test_every_second_row_lacks_the_summary():
    cold_start = module()
    rollouts = cold_start.sequences(["One text", "One text"], ["<think> a</think> sum"] * 2)
    hidden = torch.nn.functional.one_hot(rollouts.input_ids, len(cold_start.policy.tokenizer)).float()
    plain, pooled = cold_start.pooled(rollouts, hidden)
    eos = cold_start.policy.tokenizer.eos_token_id
    assert torch.equal(plain[0], plain[1])
    assert torch.count_nonzero(pooled[0]) < torch.count_nonzero(pooled[1])
    assert (rollouts.input_ids[0] == eos).sum() == 3  # two turns of the prompt, and the rationale's
    assert pooled[0][eos] > 0  # the end of the user's turn is pooled in both


def test_losses_reach_every_parameter():
    cold_start = module()
    parts = cold_start.losses(demonstrations())
    assert all(value.isfinite() for value in parts.values())
    sum(parts[name] for name in LOSSES).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in cold_start.policy.parameters())


def test_short_fit_lowers_every_loss(tmp_path):
    torch.manual_seed(0)
    cold_start, batch = (
        module(learning_rate=3e-3, warmup_steps=2, copy_steps=2),
        demonstrations(),
    )  # begins with copying, as the recipe does
    with torch.no_grad():
        before = cold_start.losses(batch)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=40, default_root_dir=tmp_path, **quiet)
    trainer.fit(cold_start, DataLoader([batch] * 40, batch_size=None))
    with torch.no_grad():
        after = cold_start.losses(batch)
    assert trainer.global_step == 40
    for name in LOSSES:
        assert after[name] < 0.9 * before[name], name


def test_copying_loss_is_cross_entropy():
    cold_start = module()
    torch.manual_seed(0)
    loss = cold_start.copying_loss(rows=3, tokens=5)
    torch.manual_seed(0)
    first = torch.randint(len(cold_start.policy.tokenizer), (3, 5))
    logits = cold_start.policy.model(input_ids=torch.cat([first, first], dim=1)).logits
    expected = [-logits[row, 4 + t].log_softmax(-1)[first[row, t]] for row in range(3) for t in range(5)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_recipe_trains_and_exports(programs, tmp_path):
    places = [f"hydra.run.dir={tmp_path}/out", f"paths.cache_dir={tmp_path}/cache", "logger=none"]
    data = ["packages.cold_start=[jinja2]", "packages.validation=[joblib]", "datamodule.modules_per_batch=2"]
    policy = (
        "policy.vocab_size=400 policy.hidden_size=32 policy.intermediate_size=48 policy.layers=1 policy.heads=2 policy.key_value_heads=1"
    )
    trainer = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "module.copy_steps=1"]
    done = programs.run("-m", "experiments.tiny_policy.train", *places, *data, *policy.split(), *trainer, "module.warmup_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    _, settings = load_policy(tmp_path / "out" / "weights")
    assert (settings.max_prompt_tokens, settings.max_new_tokens) == (144, 64)
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()
