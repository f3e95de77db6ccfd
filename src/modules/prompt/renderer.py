"""The prompt renderer of training, evaluation and export: texts to token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .plain_text import PlainText  # relative, as an export takes both files along

GRACE_INSTRUCTION = (
    "Read and analyze the following text, then you need to provide your reasoning within <think></think> tags. "
    "Finally, generate a comprehensive understanding of this text."
)
"""The representation instruction of the paper (arXiv 2510.04506)."""

_SLOT = "GRACETEXTSLOT"  # in the text's place while the template is rendered; letters only, so that no template changes it


@dataclass(frozen=True)
class Prompts:
    """Rendered chats, up to and including the header of the assistant's turn.

    Attributes:
        ids: N tensors of int64, [L_i] each.
        text_starts: [N] int64, tokens before the first token of the user's text.
        text_lengths: [N] int64, tokens of the text; the template's tokens follow.

    Example: `<user>` `a` `b` `</user>` `<assistant>` has text start 1, text length 2, L = 5.
    """

    ids: tuple[Tensor, ...]
    text_starts: Tensor
    text_lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """[N] int64, tokens of each prompt."""
        return torch.tensor([len(ids) for ids in self.ids])

    def select(self, rows: Tensor) -> "Prompts":
        """Returns the prompts at some indices, [n] int64."""
        return Prompts(tuple(self.ids[row] for row in rows.tolist()), self.text_starts[rows], self.text_lengths[rows])

    def repeat(self, n: int) -> "Prompts":
        """Returns each prompt n times, its copies side by side."""
        return self.select(torch.arange(len(self)).repeat_interleave(n))


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Returns all prompts of some parts, in order."""
    ids = tuple(ids for part in parts for ids in part.ids)
    return Prompts(ids, torch.cat([part.text_starts for part in parts]), torch.cat([part.text_lengths for part in parts]))


def require_room(context: int | None, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError if the longest prompt and rationale do not fit a model's context; None is no limit."""
    if context is not None and max_prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {max_prompt_tokens} tokens and a rationale of {max_new_tokens} do not fit the model's context of {context}: "
            "lower max_prompt_tokens (module.max_prompt_tokens) or max_new_tokens (rollout.max_new_tokens)"
        )


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Returns the ids that end a rationale, ascending: EOS, those of a model's generation config, and the control token that closes the
    assistant's turn in the chat template, which need not be among them.
    """
    named = getattr(generation_config, "eos_token_id", None)
    ends = {int(tokenizer.eos_token_id), *([named] if isinstance(named, int) else named or [])}
    after: list[int] = tokenizer(_closing_text(tokenizer), add_special_tokens=False)["input_ids"]
    return sorted({*ends, *(tokenizer.added_tokens_decoder.keys() & after[:1])})


def unclosed_turn(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> str | None:
    """Returns the text that closes the assistant's turn in the chat template if none of `end_ids` is in it; None if one is, or no text."""
    closing = _closing_text(tokenizer)
    ids: list[int] = tokenizer(closing, add_special_tokens=False)["input_ids"]
    return None if not closing or set(end_ids(tokenizer, generation_config)) & set(ids) else closing


def _closing_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what the chat template renders after an answer, stripped; empty without a template, or if it renders no answers."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    chat = [{"role": "user", "content": "text"}, {"role": "assistant", "content": _SLOT}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(_SLOT)[2].strip()
    except TemplateError:
        return ""


class PromptRenderer:
    """Renders texts as a chat of one instruction and one text.

    The template is rendered once, around a slot; its two halves, the frame, and the text are tokenised apart. So the text's
    start is exact, a long text is cut without cutting the frame, and no text can merge with the frame or, as PlainText
    gives no control tokens, end the user's turn.

    If a template has no system role, the instruction opens the user's turn, before the text's start.

    Args:
        tokenizer: one with a chat template.
        instruction: the system message; empty or None for no system turn (a template may add one itself).
        max_prompt_tokens: longest prompt, frame included.
        template_kwargs: passed to the chat template.

    Raises:
        ValueError: no chat template, a template that does not show the text once, or no room for any text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str | None = GRACE_INSTRUCTION,
        max_prompt_tokens: int = 1024,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: GRACE writes rationales in a chat; "
                "use an instruct model or add a chat_template to its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.instruction = instruction or ""
        self.max_prompt_tokens = max_prompt_tokens
        before, after = self._frame(template_kwargs or {})
        self._before: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
        self._after: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        self.max_text_tokens = max_prompt_tokens - len(self._before) - len(self._after)
        if self.max_text_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens={max_prompt_tokens} leaves no room for text: the chat template and the instruction "
                f"take {len(self._before) + len(self._after)} tokens"
            )
        self.tokenize = PlainText(tokenizer, before.replace(self.instruction.strip(), ""), after)

    def _frame(self, template_kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """Returns the rendered chat before and after the text."""

        def render(messages: list[dict[str, str]]) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs))

        user, shown = {"role": "user", "content": _SLOT}, self.instruction.strip()
        try:
            rendered = render([{"role": "system", "content": self.instruction}, user] if shown else [user])
        except TemplateError:  # what a template's raise_exception raises
            rendered = ""
        if not rendered or shown not in rendered:  # no system role: an error, or the message is dropped
            rendered = render([{"role": "user", "content": f"{self.instruction}\n\n{_SLOT}" if shown else _SLOT}])
        if rendered.count(_SLOT) != 1 or shown not in rendered:
            raise ValueError(f"the chat template of {self.tokenizer.name_or_path!r} does not show the instruction and the user's text once")
        before, after = rendered.split(_SLOT)
        return before, after

    def __call__(self, texts: Sequence[str]) -> Prompts:
        """Returns the chats of `texts` as token ids; an empty text gives the frame alone.

        Raises ValueError if there are no texts, or one has half of a surrogate pair.
        """
        if not texts:
            raise ValueError("no texts to render")
        cut = [ids[: self.max_text_tokens] for ids in self.tokenize(texts)]
        return Prompts(
            ids=tuple(torch.tensor(self._before + ids + self._after) for ids in cut),
            text_starts=torch.full((len(cut),), len(self._before)),
            text_lengths=torch.tensor([len(ids) for ids in cut]),
        )
