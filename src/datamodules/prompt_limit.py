"""Which texts fit into a policy's prompt, known from its tokenizer alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.modules.policy.loading import load_tokenizer
from src.modules.prompt.renderer import PromptRenderer
from src.records import Triplet


class PromptLimit:
    """The length of a rendered chat against `max_prompt_tokens`, for the renderer that training uses.

    Args:
        tokenizer: one with a chat template.
        instruction, max_prompt_tokens, template_kwargs: as PromptRenderer has them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str,
        max_prompt_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one (tokenizer.json): it would take hours")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
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
        """The same with the tokenizer of a model: a folder, or a name on the hub; its weights are not touched.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it brings Python code, and `trust_remote_code` does not let that run.
        """
        try:
            tokenizer = load_tokenizer(path, revision, trust_remote_code)
        except OSError as error:
            raise FileNotFoundError(
                f"no tokenizer at {path!r}: give policy.path a local folder with a model and its tokenizer, or a hub name on a "
                f"machine that reaches the hub ({str(error).splitlines()[0]})"
            ) from error
        return cls(tokenizer, instruction, max_prompt_tokens, template_kwargs)

    @property
    def key(self) -> str:
        """Names what the lengths depend on: of the chat's frame they know the number of tokens, not the words."""
        settings = [self.tokenizer.backend_tokenizer.to_str(), *self._tokenize.control_strings]
        return f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()} {self.max_text_tokens}"

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """For each text, whether its prompt is within the limit, so that none of it would be cut off."""
        return [len(ids) <= self.max_text_tokens for ids in self._tokenize(texts)]

    def within(self, triplets: Sequence[Triplet]) -> list[Triplet]:
        """Those of which every text fits."""
        texts = [triplet.texts for triplet in triplets]
        fits = iter(self.fits([text for own in texts for text in own]))
        return [triplet for triplet, own in zip(triplets, texts, strict=True) if all(list(islice(fits, len(own))))]
