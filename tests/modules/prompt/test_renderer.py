"""Text starts, truncation and the frame, on real tokenizers with templates of every kind."""

import pytest
from transformers import PreTrainedTokenizerFast

from src.modules.prompt.renderer import GRACE_INSTRUCTION, PromptRenderer
from tests.chat_templates import CHATML, LLAMA3_LIKE, TEMPLATES, WITH_SYSTEM_ROLE, tokenizer_with

pytestmark = pytest.mark.filterwarnings("ignore:.*reads character by character")  # the small tokenizer has no token of [INST]

INSTRUCTION = "Name the terms that matter."
TEXT = "Return the eigenvalues of a matrix, then decode each line."


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tokenizer_with(request.param)


def chat_of(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The chat as the template writes it: with a system message if it shows one, else with the instruction before the text."""
    if tokenizer.chat_template in WITH_SYSTEM_ROLE.values():
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    else:
        messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{text}"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_ids_and_text_start_of_template(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = PromptRenderer(tokenizer, INSTRUCTION)([TEXT, "One word"])
    for i, text in enumerate([TEXT, "One word"]):
        chat = chat_of(tokenizer, text)
        expected = tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True)
        first = chat.index(text)
        inside = [first <= left and right <= first + len(text) for left, right in expected["offset_mapping"]]
        start, length = int(prompts.text_starts[i]), int(prompts.text_lengths[i])
        assert prompts.ids[i].tolist() == expected["input_ids"]
        assert (start, length) == (inside.index(True), sum(inside))
        assert INSTRUCTION in tokenizer.decode(prompts.ids[i][:start])
        assert tokenizer.decode(prompts.ids[i][start : start + length]) == text
    assert prompts.lengths.tolist() == [len(ids) for ids in prompts.ids]


def test_long_text_is_cut_inside_text(tokenizer: PreTrainedTokenizerFast) -> None:
    full = PromptRenderer(tokenizer, INSTRUCTION)([TEXT])
    limit = int(full.lengths[0]) - 5
    cut = PromptRenderer(tokenizer, INSTRUCTION, max_prompt_tokens=limit)([TEXT, "short"])
    start, length = int(full.text_starts[0]), int(full.text_lengths[0])
    ids = full.ids[0].tolist()
    assert cut.ids[0].tolist() == ids[: start + length - 5] + ids[start + length :]
    assert (int(cut.lengths[0]), int(cut.text_lengths[0])) == (limit, length - 5)
    assert cut.lengths[1] < limit


def test_empty_text_is_frame_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = PromptRenderer(tokenizer, INSTRUCTION)(["", "  \n ", "x"])
    assert prompts.text_lengths.tolist() == [0, 0, len(tokenizer("x")["input_ids"])]
    assert prompts.ids[0].tolist() == prompts.ids[1].tolist()
    assert int(prompts.lengths[0]) > int(prompts.text_starts[0])  # the template's tokens after it are pooled


def test_template_arguments_reach_template() -> None:
    tokenizer = tokenizer_with(LLAMA3_LIKE)
    prompts = PromptRenderer(tokenizer, INSTRUCTION, template_kwargs={"date_string": "1 Jan 2030"})([TEXT])
    assert "Today Date: 1 Jan 2030" in tokenizer.decode(prompts.ids[0])


def test_default_instruction_is_the_papers() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert GRACE_INSTRUCTION in tokenizer.decode(PromptRenderer(tokenizer)([TEXT]).ids[0])


@pytest.mark.parametrize(
    ("template", "limit", "message"),
    [
        (None, 100, "has no chat template"),
        (CHATML, 8, r"max_prompt_tokens=8 leaves no room for text: .* take \d+ tokens"),
        ("{{ messages[-1].content }}{{ messages[-1].content }}", 100, "does not show the instruction"),
        ("nothing of what was said", 100, "does not show the instruction"),
        ("{{ messages[-1].content | upper }}", 100, "does not show the instruction"),
        (CHATML, 100, "no texts"),
    ],
    ids=["no template", "no room", "text twice", "no text", "changed text", "no texts"],
)
def test_bad_template_limit_or_texts(template: str | None, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PromptRenderer(tokenizer_with(template), INSTRUCTION, max_prompt_tokens=limit)([])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("instruction", ["", "  ", None])
def test_no_instruction_is_no_system_turn(tokenizer: PreTrainedTokenizerFast, instruction: str | None) -> None:
    ids = PromptRenderer(tokenizer, instruction)([TEXT]).ids[0].tolist()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer(chat, add_special_tokens=False)["input_ids"]
