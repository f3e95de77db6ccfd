"""Tokenises texts as plain characters: no text can produce a control token of the chat template."""

import re
import warnings
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_NEVER_TEXT = re.compile(r"<[|｜].*[|｜]>|</?think>", re.DOTALL)  # noqa: RUF001, DeepSeek's bars are these
"""Added tokens that steer a model even if its tokenizer does not call them special and its template does not contain them."""

_BRACKETED = re.compile(r"[\[<{]{1,2}[^\s\[\]<>{}]+[\]>}]{1,2}")
_NOTHING = "(?!)"  # matches nowhere
_SURROGATE = re.compile("[\ud800-\udfff]")


class PlainText:
    """Tokenises user texts without control tokens.

    Control strings are the tokenizer's special tokens, the added tokens of `_NEVER_TEXT` and of the chat template
    (`<tool_call>`), and a template's turn marks in plain characters (`[/INST]`). A text without one is tokenised by the
    tokenizer as usual. In any other text the single characters of a control string are tokenised one by one, which gives
    neither the id of a control token nor the ids of a turn mark. If the tokenizer reads a turn mark in single characters
    anyway, a warning says so.

    Args:
        tokenizer: it is not changed.
        before, after: the rendered chat on both sides of the text, without the instruction.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: str = "", after: str = "") -> None:
        self.tokenizer = tokenizer
        tokens = control_tokens(tokenizer)
        self.control_ids = {int(i) for i in tokenizer.convert_tokens_to_ids(tokens)} - {tokenizer.unk_token_id}  # type: ignore[union-attr]
        self.control_strings = sorted({*tokens, *turn_marks(before, after, tokens)}, key=lambda token: (-len(token), token))
        for mark in self.control_strings:
            if mark not in tokens and self._encode([mark])[0] == self._apart(["", mark]):
                warnings.warn(
                    f"the chat template of {tokenizer.name_or_path!r} marks turns by {mark!r}, which its tokenizer reads character by "
                    "character: a text that holds it cannot be told from the template",
                    stacklevel=2,
                )
        self._control = re.compile(f"({'|'.join(map(re.escape, self.control_strings)) or _NOTHING})")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without the white space around it.

        Raises ValueError if a text has half of a surrogate pair, or a character that the tokenizer makes a control token.
        """
        stripped = [text.strip() for text in texts]
        for text in stripped:
            if not text.isascii() and _SURROGATE.search(text):
                raise ValueError(f"the text {text[:80]!r} has half of a surrogate pair, which is no character: take it out")
        parts = [self._control.split(text) for text in stripped]  # one part: an ordinary text
        ordinary = iter(self._encode([text for text, own in zip(stripped, parts, strict=True) if len(own) == 1]))
        ids = [next(ordinary) if len(own) == 1 else self._apart(own) for own in parts]
        return [own if self.control_ids.isdisjoint(own) else self._by_character(text) for own, text in zip(ids, stripped, strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _apart(self, parts: Sequence[str]) -> list[int]:
        """Returns the ids of a split text; the parts at odd places are control strings."""
        pieces = [piece for i, part in enumerate(parts) for piece in (part if i % 2 else [part]) if piece]
        return [i for ids in self._encode(pieces) for i in ids]

    def _by_character(self, text: str) -> list[int]:
        """Returns the ids of single characters, for a text that the tokenizer normalises to a control token (`</THINK>`, lower-cased)."""
        ids = [i for own in self._encode(list(text)) for i in own]
        left = self.control_ids.intersection(ids)
        if left:
            names = self.tokenizer.convert_ids_to_tokens(sorted(left))
            raise ValueError(f"the tokenizer of {self.tokenizer.name_or_path!r} makes the control token {names[0]!r} of one character")
        return ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that steer a chat. A token of one or two characters, or one that is a word, is text (`!` as padding)."""
    added = tokenizer.added_tokens_decoder.values()
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    steering = {
        token.content for token in added if token.special or _NEVER_TEXT.fullmatch(token.content) or token.content.strip() in template
    }
    steering |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(token for token in steering if _is_mark(token))


def turn_marks(before: str, after: str, tokens: Sequence[str]) -> set[str]:
    """Returns a template's turn marks in plain characters: words in brackets, and the rest of the lines after the text."""
    found = {mark for part in _without(before, tokens) for mark in _BRACKETED.findall(part)}
    for part in _without(after, tokens):
        found.update(_BRACKETED.findall(part))
        found.update(line.strip() for line in _BRACKETED.sub("\n", part).splitlines())
    # a word alone, as `assistant` between two tokens, is harmless
    return {mark for mark in found if len(mark) > 2 and any(map(str.isalnum, mark)) and not (mark[0].isalnum() and mark[-1].isalnum())}


def _is_mark(token: str) -> bool:
    token = token.strip()
    return len(token) > 2 and not token[0].isalnum() and not token[-1].isalnum() and any(map(str.isalnum, token))


def _without(text: str, tokens: Sequence[str]) -> list[str]:
    return re.split("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or _NOTHING, text)
