"""Rollouts: what the rollout engines hand to everything after them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.modules.prompt.renderer import Prompts


@dataclass(frozen=True)
class Rollouts:
    """Prompts with a rationale each, right-padded (causal attention then needs no mask).

    Attributes:
        input_ids: [N, T] int64; prompt, rationale (its EOS included), padding.
        text_starts: [N] int64, tokens before the user's text.
        prompt_lengths: [N] int64, tokens before the rationale.
        lengths: [N] int64, prompt and rationale.
        finished: [N] bool, False where the rationale met the length limit before EOS.
        logprobs: [N, T] float32 log-probability of each rationale token under the distribution it was drawn from, 0
            elsewhere; None from an engine that does not say.
        embeddings: [N, D] float32 pooled, not normalised; None from an engine that cannot pool as it samples.
        prefix_embeddings: [N, R + 1, D] float32, the same after t = 0 .. R tokens of the rationale, where it is shorter its
            last; None unless asked for.
        prompt_embeddings: [N, D] float32, the same of the prompt alone; None from an engine that cannot pool as it samples.

    Example: prompt `p q`, rationale `a EOS`, T = 5: input_ids `p q a EOS pad`, prompt length 2, length 4.
    """

    input_ids: Tensor
    text_starts: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    finished: Tensor
    logprobs: Tensor | None = None
    embeddings: Tensor | None = None
    prefix_embeddings: Tensor | None = None
    prompt_embeddings: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)

    @property
    def attention_mask(self) -> Tensor:
        """[N, T] bool, True on tokens that are not padding."""
        return self._positions() < self.lengths.unsqueeze(1)

    @property
    def pooling_mask(self) -> Tensor:
        """[N, T] bool, True from the first token of the text to the last of the rationale."""
        return self.attention_mask & (self._positions() >= self.text_starts.unsqueeze(1))

    @property
    def rationale_mask(self) -> Tensor:
        """[N, T] bool, True on the rationale's tokens, EOS included."""
        return self.attention_mask & (self._positions() >= self.prompt_lengths.unsqueeze(1))

    @property
    def rationale_lengths(self) -> Tensor:
        """[N] int64, tokens of the rationales."""
        return self.lengths - self.prompt_lengths

    def rationales(self) -> list[Tensor]:
        """N tensors of int64: the ids of each rationale."""
        return [ids[start:end] for ids, start, end in zip(self.input_ids, self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)]

    def __getitem__(self, index: slice | Tensor) -> "Rollouts":
        """The rollouts that `index` selects, padded no longer than the longest of them."""
        longest = int(self.lengths[index].max())
        return Rollouts(
            self.input_ids[index, :longest],
            self.text_starts[index],
            self.prompt_lengths[index],
            self.lengths[index],
            self.finished[index],
            None if self.logprobs is None else self.logprobs[index, :longest],
            None if self.embeddings is None else self.embeddings[index],
            None if self.prefix_embeddings is None else self.prefix_embeddings[index],
            None if self.prompt_embeddings is None else self.prompt_embeddings[index],
        )

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def join(
    prompts: Prompts,
    rationales: Sequence[Tensor],
    finished: Tensor,
    pad_id: int,
    logprobs: Sequence[Tensor] | None = None,
) -> Rollouts:
    """Prompts and rationale ids (N tensors of int64, [R_i], R_i >= 0) as right-padded rollouts.

    `logprobs`, where given, are N tensors of float32, [R_i].
    """
    rows = [torch.cat([prompt, rationale]) for prompt, rationale in zip(prompts.ids, rationales, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    scattered = None
    if logprobs is not None:
        scattered = torch.zeros(input_ids.shape)
        for row, start, values in zip(scattered, prompts.lengths.tolist(), logprobs, strict=True):
            row[start : start + len(values)] = values
    return Rollouts(
        input_ids=input_ids,
        text_starts=prompts.text_starts,
        prompt_lengths=prompts.lengths,
        lengths=torch.tensor([len(row) for row in rows]),
        finished=finished,
        logprobs=scattered,
    )


def dummy_rollouts(pad_id: int) -> Rollouts:
    """One rollout of two tokens that mean nothing, for a pass that is made for its own sake."""
    one = torch.ones(1, dtype=torch.long)
    return Rollouts(torch.full((1, 2), pad_id), 0 * one, one, 2 * one, torch.ones(1, dtype=torch.bool))


def without_rationales(prompts: Prompts, pad_id: int) -> Rollouts:
    """Prompts alone, as rollouts whose rationales are empty and finished."""
    nothing = [torch.empty(0, dtype=torch.long)] * len(prompts)
    return join(prompts, nothing, torch.ones(len(prompts), dtype=torch.bool), pad_id)
