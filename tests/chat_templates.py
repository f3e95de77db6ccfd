"""Chat templates of every kind that is met, and tokenizers with the special and added tokens of the models that have them."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.builders import SENTENCES, small_tokenizer
from tests.conftest import ROOT

CHATML = small_tokenizer().chat_template

QWEN_LIKE = (  # brings its own system message where none is given
    "{%- if messages[0]['role'] == 'system' -%}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' -}}"
    "{%- else -%}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role != 'system' -%}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

QWEN3_LIKE = (  # takes the reasoning out of earlier answers, and can close it before the answer
    "{%- if messages[0].role == 'system' -%}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}"
    "{%- elif m.role == 'assistant' -%}{%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}"
    "{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' -}}"
    "{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"
)

LLAMA3_LIKE = (  # opens with a BOS token, dates the system message, trims what it is given
    "{{- bos_token -}}{%- set date = date_string if date_string is defined else '26 Jul 2024' -%}"
    "{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' + system + '<|eot_id|>' -}}"
    "{%- for m in messages if m.role != 'system' -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MERGES_SYSTEM = (  # the system message stands inside the user's turn
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "<|im_start|>[INST] {{ system }}{{ messages[-1].content }} [/INST]{% if add_generation_prompt %}<|im_end|>{% endif %}"
)

PLAIN_MARKS = (  # of its marks only the BOS is a token
    "{{ bos_token }}[INST] <<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{{ messages[1].content }} [/INST]"
    "{% if add_generation_prompt %}\n### Response:\n{% endif %}"
)

WITH_SYSTEM_ROLE = {"chatml": CHATML, "qwen": QWEN_LIKE, "llama3": LLAMA3_LIKE, "merges": MERGES_SYSTEM}
WITHOUT_SYSTEM_ROLE = {"refuses": REFUSES_SYSTEM, "drops": DROPS_SYSTEM}
TEMPLATES = WITH_SYSTEM_ROLE | WITHOUT_SYSTEM_ROLE


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """The small tokenizer with the tokens of all these templates, all of them special."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _merges() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = "[INST] [/INST] <<SYS>> <</SYS>> ### Response:"  # common enough to have tokens of more than one character
    bpe.train_from_iterator(
        [*SENTENCES * 4, *[marks] * 50], trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return bpe.to_str()


def model_like(
    template: str, special: list[str], added: list[str], eos: str, bos: str | None = None, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose `special` tokens are special, and whose `added` ones are not, though they are single tokens."""
    bpe = Tokenizer.from_str(_merges())
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.add_tokens([AddedToken(token, special=False, normalized=normalizer is not None) for token in added])
    if normalizer is not None:
        bpe.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=special[0], bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|image_pad|>"]
_QWEN_ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|repo_name|>"]
_LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
_LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(20)]


def every_tokenizer() -> dict[str, PreTrainedTokenizerBase]:
    """The shipped one, those with the tokens of Qwen2.5, Qwen3 and Llama 3, and one whose marks are plain characters."""
    thinking = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    return {
        "shipped": AutoTokenizer.from_pretrained(ROOT / "experiments" / "tiny_policy" / "weights"),
        "qwen2.5": model_like(QWEN_LIKE, _QWEN_SPECIAL, _QWEN_ADDED, eos="<|im_end|>"),
        "qwen3": model_like(QWEN3_LIKE, _QWEN_SPECIAL, [*_QWEN_ADDED, *thinking], eos="<|im_end|>"),
        "llama3": model_like(LLAMA3_LIKE, _LLAMA3_SPECIAL, [], eos="<|eot_id|>", bos="<|begin_of_text|>"),
        "plain marks": model_like(PLAIN_MARKS, ["<unk>", "<s>", "</s>"], ["  ", "    "], eos="</s>", bos="<s>"),
    }
