"""Checks which texts fit into a policy's prompt, with its tokenizer alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.modules.policy.loading import load_tokenizer, not_found
from src.modules.prompt.renderer import PromptRenderer
from src.records import Triplet


class PromptLimit:
    """Compares the length of rendered prompts with `max_prompt_tokens`, for the renderer that training uses.

    Args:
        tokenizer: a fast one with a chat template.
        instruction, max_prompt_tokens, template_kwargs: see PromptRenderer.

    Raises:
        ValueError: the tokenizer is a slow one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, instruction: str, max_prompt_tokens: int, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one (tokenizer.json): it would take hours")
        self.tokenizer, self.max_prompt_tokens = tokenizer, max_prompt_tokens
        renderer = PromptRenderer(tokenizer, instruction, max_prompt_tokens, template_kwargs)
        self.max_text_tokens, self._tokenize = renderer.max_text_tokens, renderer.tokenize

    @classmethod
    def load(
        cls,
        path: str,
        instruction: str,
        max_prompt_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "PromptLimit":
        """Returns the limit for the tokenizer of a model folder or a name on the hub. The weights are not read.

        Raises:
            FileNotFoundError: there is no tokenizer.
            ValueError: it brings Python code, and `trust_remote_code` is false.
        """
        try:
            tokenizer = load_tokenizer(path, revision, trust_remote_code)
        except OSError as error:
            raise not_found(path, error) from error
        return cls(tokenizer, instruction, max_prompt_tokens, template_kwargs)

    @property
    def key(self) -> str:
        """A digest of all that decides on lengths: tokenizer, control strings and the tokens left for a text."""
        settings = [self.tokenizer.backend_tokenizer.to_str(), *self._tokenize.control_strings]
        return f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()} {self.max_text_tokens}"

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Returns for each text whether none of it would be cut off."""
        return [len(ids) <= self.max_text_tokens for ids in self._tokenize(texts)]

    def within(self, triplets: Sequence[Triplet]) -> list[Triplet]:
        """Returns the triplets of which every text fits."""
        fits = iter(self.fits([text for triplet in triplets for text in triplet.texts]))
        return [triplet for triplet in triplets if all(list(islice(fits, len(triplet.texts))))]
