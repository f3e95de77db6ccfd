"""The tokens that end a rationale."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import end_ids, unclosed_turn
from src.modules.rollouts.engine import end_tokens
from tests.builders import SENTENCES, loader, make, quiet_trainer, small_model, small_tokenizer
from tests.chat_templates import CHATML, DROPS_SYSTEM, LLAMA3_LIKE, MERGES_SYSTEM, PLAIN_MARKS, QWEN3_LIKE, REFUSES_SYSTEM, tokenizer_with


@pytest.mark.parametrize(
    ("template", "end"),
    [
        *((template, "<|im_end|>") for template in (CHATML, QWEN3_LIKE, REFUSES_SYSTEM, DROPS_SYSTEM)),
        (LLAMA3_LIKE, "<|eot_id|>"),
        *((template, None) for template in (MERGES_SYSTEM, PLAIN_MARKS, "{{ raise_exception('no') }}", None)),
    ],
)
def test_end_of_turn_is_found_by_rendering(template: str | None, end: str | None) -> None:
    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    expected = {tokenizer.eos_token_id, *([] if end is None else [tokenizer.convert_tokens_to_ids(end)])}
    assert set(end_ids(tokenizer, None)) == expected


def closing(limit: int, folder: Path) -> tuple[Policy, RationaleEncoder]:
    """A policy whose EOS is </s>, and which closes its turns with <|im_end|>, as its template does."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    policy = Policy(small_model(len(tokenizer), kind="untied"), tokenizer)
    with torch.no_grad():
        policy.model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        policy.model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 4
    export(policy, EncoderSettings(instruction="Name the terms.", max_prompt_tokens=128, max_new_tokens=limit), folder)
    return policy, RationaleEncoder.from_pretrained(folder, device="cpu")


def test_end_of_turn_ends_a_rationale_here_and_in_sentence_transformers(tmp_path: Path) -> None:
    policy, encoder = closing(24, tmp_path / "export")
    assert end_tokens(policy).tolist() == sorted(policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    vectors, rationales = encoder.explain(SENTENCES)
    lengths = [len(policy.tokenizer(rationale, add_special_tokens=False)["input_ids"]) for rationale in rationales]
    assert min(lengths) < 20
    library = SentenceTransformer(str(tmp_path / "export"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(torch.tensor(library.encode(list(SENTENCES), rationale=True)), torch.tensor(vectors), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("template", "closing"), [(CHATML, None), (LLAMA3_LIKE, None), (None, None), (CHATML.replace("<|im_end|>", "### End"), "### End")]
)
def test_turn_that_no_token_closes_is_said(template: str | None, closing: str | None, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    assert unclosed_turn(tokenizer, None) == closing
    if template is not None:
        module = make()
        module.policy.model.resize_token_embeddings(len(tokenizer))
        module.policy.tokenizer = tokenizer
        quiet_trainer(max_steps=0).fit(module, loader([]))
        assert ("closes an answer with '### End'" in caplog.text) == (closing is not None)


def test_padded_rows_are_not_written_by_sentence_transformers(tmp_path: Path) -> None:
    policy = Policy(small_model(len(small_tokenizer()) + 60, kind="untied"), small_tokenizer())
    with torch.no_grad():
        policy.model.lm_head.weight[-60:] *= 20  # the likeliest, if they could be drawn
    export(policy, EncoderSettings(instruction="Name the terms.", max_prompt_tokens=128, max_new_tokens=8), tmp_path / "export")
    ours = RationaleEncoder.from_pretrained(tmp_path / "export", device="cpu").encode(SENTENCES)
    library = SentenceTransformer(str(tmp_path / "export"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(torch.tensor(library.encode(list(SENTENCES), rationale=True)), torch.tensor(ours), atol=1e-4, rtol=0)
