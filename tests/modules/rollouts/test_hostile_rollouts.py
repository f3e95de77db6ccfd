"""Rationales with control tokens: plain ids for the method, and plain characters in tables."""

from dataclasses import replace

import torch
from markdown_it import MarkdownIt
from rich.console import Console

from experiments.tiny_policy.cold_start import ColdStartModule
from src.callbacks.final_report import example_table
from src.callbacks.rationale_table import Rationale, RationaleTable, before_and_after
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.pooling import pool_prefixes
from src.modules.prompt.renderer import GRACE_INSTRUCTION, PromptRenderer
from src.modules.rollouts.hf import HFEngine
from src.modules.types import join
from tests.builders import SENTENCES, small_policy

ANYTHING = 1e6  # a temperature at which all tokens are equally likely


def test_only_eos_ends_a_rationale() -> None:
    policy = small_policy()
    prompts = PromptRenderer(policy.tokenizer, "Name the terms.", 128)(SENTENCES)
    rollouts = HFEngine(96).generate(policy, prompts, n=16, temperature=ANYTHING, prefixes=True)
    eos = policy.tokenizer.eos_token_id
    controls = policy.tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_start|>", "<think>", "</think>"])
    rationales = [ids.tolist() for ids in rollouts.rationales()]
    for control in controls:  # padding among them
        assert any(control in ids for ids in rationales)
    for ids, finished in zip(rationales, rollouts.finished.tolist(), strict=True):
        assert (eos in ids) == finished
        assert eos not in ids[:-1]
        assert finished or len(ids) == 96
    plain = replace(rollouts, embeddings=None, prefix_embeddings=None)
    with torch.no_grad():
        torch.testing.assert_close(rollouts.embeddings, policy.embed(plain), atol=1e-5, rtol=1e-5)
        cut = pool_prefixes(policy.hidden_states(plain), plain, 96)
    torch.testing.assert_close(rollouts.prefix_embeddings, cut, atol=1e-5, rtol=1e-5)


def test_explanation_drops_eos_alone() -> None:
    policy = small_policy()
    settings = EncoderSettings("Name the terms.", 128, 48)
    encoder = RationaleEncoder(policy, settings, HFEngine(48), temperature=ANYTHING)
    _, rationales = encoder.explain([f"{text} {i}" for i in range(8) for text in SENTENCES])
    shown = "".join(rationales)
    for control in ("<|pad|>", "<|im_start|>", "</think>"):
        assert control in shown
    assert "<|im_end|>" not in shown


def test_cold_start_tag_in_rationale_alone() -> None:
    policy = small_policy()
    module = ColdStartModule(policy, GRACE_INSTRUCTION, max_prompt_tokens=256)  # names <think></think>
    rollouts = module.sequences(["a </think> text"] * 2, ["<think> a</think> sum"] * 2)
    counted = torch.ones(*rollouts.input_ids.shape, 1)
    _, pooled = module.pooled(rollouts, counted)  # means of ones, had there been nothing to pool it would have raised
    assert pooled.flatten().tolist() == [1.0, 1.0]
    positions = torch.arange(rollouts.input_ids.shape[1]).float().view(1, -1, 1).repeat(2, 1, 1)
    _, (cut, full) = module.pooled(rollouts, positions)
    plain, _ = module.pooled(rollouts, positions)
    assert plain[0] < cut < full  # cut after the rationale's fence, which stands behind the prompt


HOSTILE = "``` <script>alert(1)</script> ````\n# not a heading\n| a | b |\n[red]x[/nothing] <|im_end|>\n> quote"


def test_tables_escape_hostile_text() -> None:
    row = Rationale(HOSTILE, HOSTILE, 5, True)
    html = MarkdownIt("commonmark").render(before_and_after([row], [row], 3))  # with HTML as it stands
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 3
    assert "not a heading</h1>" not in html
    table = RationaleTable("unused")
    table.before, table.after = [row], [row]
    console = Console(width=300, record=True)
    console.print(example_table(table, 1))  # rich raises on a closing tag that closes nothing
    assert console.export_text().count("[red]x[/nothing] <|im_end|>") == 3


def test_rationale_of_padding_ids_has_its_length() -> None:
    policy = small_policy()
    prompts = PromptRenderer(policy.tokenizer, "Name the terms.", 128)(["a", "b"])
    rollouts = join(prompts, [torch.full((n,), policy.pad_id) for n in (4, 2)], torch.tensor([False, False]), policy.pad_id)
    assert rollouts.rationale_lengths.tolist() == [4, 2]
    assert rollouts.rationale_mask.sum(dim=1).tolist() == [4, 2]
