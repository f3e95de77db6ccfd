"""The data that passes between the rooms of src/modules, with every tensor's shape.

B instances of the global batch (all ranks), K rationales of each text that is learned from, M negatives an instance, D hidden size,
T tokens of prompt and rationale, R of the longest rationale.

Prompts (prompt/renderer.py) -> Rollouts -> RolloutBatch, Embeddings -> Reward -> Experience (training/experience.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from src.modules.prompt.renderer import Prompts

Role = Literal["query", "positive", "negative"]
"""The role of a text in its instance."""
ROLES: tuple[Role, ...] = ("positive", "query", "negative")
CONTEXT_ROLES: tuple[Role, ...] = ("query", "negative")
"""Those that positives are compared with."""


@dataclass(frozen=True)
class Rollouts:
    """Prompts with a rationale each, right-padded (causal attention then needs no mask).

    Attributes:
        input_ids: [N, T] int64; prompt, rationale (its EOS included), padding.
        text_starts: [N] int64, position of the first token of the text.
        prompt_lengths: [N] int64, tokens before the rationale.
        lengths: [N] int64, tokens of prompt and rationale.
        finished: [N] bool, False if the rationale met the length limit before EOS.
        logprobs: [N, T] float32 log-probs of the rationale's tokens under the distribution they were drawn from, 0 elsewhere; None if the
            engine does not report them.
        embeddings: [N, D] float32 pooled, not normalised; None if the engine does not pool.
        prefix_embeddings: [N, R + 1, D] float32, the same after t = 0 .. R tokens of the rationale, constant past its end; None unless
            asked for.
        prompt_embeddings: [N, D] float32, the same of the prompt alone; None if the engine does not pool.

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

    @property
    def attention_mask(self) -> Tensor:
        """[N, T] bool, True on tokens that are not padding."""
        return self._from(torch.zeros_like(self.lengths))

    @property
    def pooling_mask(self) -> Tensor:
        """[N, T] bool, True from the first token of the text to the last of the rationale."""
        return self._from(self.text_starts)

    @property
    def rationale_mask(self) -> Tensor:
        """[N, T] bool, True on the rationale's tokens, EOS included."""
        return self._from(self.prompt_lengths)

    def _from(self, starts: Tensor) -> Tensor:
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (positions >= starts.unsqueeze(1)) & (positions < self.lengths.unsqueeze(1))

    @property
    def rationale_lengths(self) -> Tensor:
        """[N] int64, tokens of the rationales."""
        return self.lengths - self.prompt_lengths

    def rationales(self) -> list[Tensor]:
        """Returns N tensors of int64, the ids of each rationale."""
        return [ids[start:end] for ids, start, end in zip(self.input_ids, self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)]

    def __getitem__(self, index: slice | Tensor) -> "Rollouts":
        """Selects rollouts, padded no longer than the longest of them."""
        longest = int(self.lengths[index].max())
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {name: x[index, :longest] if name in ("input_ids", "logprobs") else x[index] for name, x in found.items() if x is not None}
        return Rollouts(**cut)

    def to(self, device: torch.device | str) -> "Rollouts":
        """Returns the same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def prompts_alone(self) -> "Rollouts":
        """Returns the same with empty, finished rationales; `embeddings` are those of the prompts."""
        plain = Rollouts(
            *(self.input_ids, self.text_starts, self.prompt_lengths, self.prompt_lengths, torch.ones_like(self.finished)),
            embeddings=self.prompt_embeddings,
        )
        return plain[torch.arange(len(self), device=self.lengths.device)]  # padded no longer than the longest prompt

    def tokens_alone(self) -> "Rollouts":
        """Returns the same without embeddings, which are large, once rewards are known."""
        return replace(self, embeddings=None, prefix_embeddings=None, prompt_embeddings=None)


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of one global batch.

    Attributes:
        query: [B, D] float32, one rollout each.
        positive: [B, K, D] float32.
        negative: [B, M, D] float32, M >= 0, one rollout each.
        same: [B, B] bool, True where two instances share a text, so that neither is a negative of the other (roles.same_texts); None if
            no two do.
    """

    query: Tensor
    positive: Tensor
    negative: Tensor
    same: Tensor | None = None

    @property
    def others(self) -> Tensor:
        """[B, B] bool, True where instance j is an in-batch negative of instance i."""
        b = len(self.query)
        apart = ~torch.eye(b, dtype=torch.bool, device=self.query.device)
        return apart if self.same is None else apart & ~self.same

    @classmethod
    def normalised(cls, query: Tensor, positive: Tensor, negative: Tensor) -> "Embeddings":
        """Makes unit vectors of pooled hidden states."""
        return cls(*(F.normalize(x, dim=-1) for x in (query, positive, negative)))


@dataclass(frozen=True)
class Reward:
    """The rewards of the positives' rollouts.

    Attributes:
        terms: each term by name, [B, K] float32, before weighting.
        weights: of each term; a term of weight 0 is only logged.
        total: [B, K] float32, scale * sum of weight * term; before shaping.
        scale: of the total, such as 1 / temperature.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    total: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class GreedyRollouts:
    """One greedy rollout of each of G texts, all ranks': unit vectors [G, 1, D], lengths [G, 1] int64, finished [G, 1] bool."""

    embeddings: Tensor
    lengths: Tensor
    finished: Tensor


@dataclass(frozen=True)
class RoleRollouts:
    """K rollouts of each text of one role that is learned from: G texts of all ranks, g of this rank.

    Attributes:
        rollouts: this rank's g*K, those of a text side by side, without embeddings.
        instance_ids: this rank's g record ids.
        embeddings: [G, K, D] float32 unit vectors.
        lengths, finished: [G, K] int64 tokens of the rationales, and bool.
        old_logprobs: [g*K, T] float32 of the sampling policy; None if one update makes them those of the update.
        reference_logprobs: [g*K, T] float32; None if the algorithm has no reference.
        divergence: [G, K, R] float32 from the reference, by token; None unless it is taken off the reward.
        prefixes: [G, K, R + 1, D] unit vectors after t = 0 .. R tokens of the rationales; None without token credit.
        greedy: None unless the algorithm's baseline is a greedy rollout.
    """

    rollouts: Rollouts
    instance_ids: tuple[str, ...]
    embeddings: Tensor
    lengths: Tensor
    finished: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    divergence: Tensor | None = None
    prefixes: Tensor | None = None
    greedy: GreedyRollouts | None = None


@dataclass(frozen=True)
class PlainTexts:
    """Texts of one role without rationales: this rank's as `rollouts`, and `embeddings`, unit vectors [B, D] or [B*M, D] of all ranks."""

    rollouts: Rollouts
    embeddings: Tensor


@dataclass(frozen=True)
class RolloutBatch:
    """One batch of B instances before any update. Everything that rewards need is of all ranks: gathered here, once.

    Attributes:
        roles: those that are learned from, the positives first.
        embeddings: unit vectors of all roles, with one rollout of each query and negative.
        context_roles: those that are not learned from.
        context: one rollout of each of their texts on this rank, role after role; None if there are none.
        instance_ids: B record ids.
        rollout_tokens: tokens that this rank sampled.
        distinct_rationales: share of different rationales among the positives' B*K.
        seconds: wall time of this rank by phase.
        plain: the texts of all roles without rationales; empty unless something is distilled into their embeddings.
    """

    roles: dict[Role, RoleRollouts]
    embeddings: Embeddings
    context_roles: tuple[Role, ...]
    context: Rollouts | None
    instance_ids: tuple[str, ...]
    rollout_tokens: int
    distinct_rationales: float
    seconds: dict[str, float]
    plain: dict[Role, PlainTexts] = field(default_factory=dict)

    def without_prefixes(self) -> "RolloutBatch":
        """Returns the same without the embeddings of prefixes, which are large, once advantages are known."""
        return replace(self, roles={role: replace(group, prefixes=None) for role, group in self.roles.items()})


def join(
    prompts: Prompts,
    rationales: Sequence[Tensor],
    finished: Tensor,
    pad_id: int,
    logprobs: Sequence[Tensor] | None = None,
) -> Rollouts:
    """Joins prompts and rationale ids (N tensors of int64, [R_i], R_i >= 0) to right-padded rollouts.

    `logprobs`, if given, are N tensors of float32, [R_i].
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
    """Returns one rollout of two padding tokens, for a pass that is made for its side effects."""
    one = torch.ones(1, dtype=torch.long)
    return Rollouts(torch.full((1, 2), pad_id), 0 * one, one, 2 * one, torch.ones(1, dtype=torch.bool))


def without_rationales(prompts: Prompts, pad_id: int) -> Rollouts:
    """Returns prompts as rollouts whose rationales are empty and finished."""
    nothing = [torch.empty(0, dtype=torch.long)] * len(prompts)
    return join(prompts, nothing, torch.ones(len(prompts), dtype=torch.bool), pad_id)
