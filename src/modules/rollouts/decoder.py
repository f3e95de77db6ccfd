"""Decoding of one batch: a step over tensors that keep their place, which a CUDA graph can replay."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.modules.policy.attention.shared_cache import SharedPromptCache, front
from src.modules.policy.buffers import Buffers
from src.modules.policy.logprobs import tokens_at_a_time
from src.modules.policy.model import Policy
from src.modules.policy.pooling import POOLINGS, states_at
from src.modules.policy.products import logits_of
from src.modules.prompt.renderer import Prompts


@dataclass(frozen=True)
class Pace:
    """The pace of decoding on a device.

    Attributes:
        check: steps between two looks at which rows have finished; on a GPU a look waits for all that was launched.
        leave: finished rows leave once buffers of at most this share of the rows hold the others.
        bucket: (prompts, rows or a prompt's tokens) -> as many as buffers are made for. A captured graph has fixed shapes.
        longer: (columns that a step reads) -> those that it reads once they are full.
    """

    check: int
    leave: float
    bucket: Callable[[int], int]
    longer: Callable[[int], int]


def rounded_up(count: int) -> int:
    """Returns the least of 1 .. 8, 10, 12, 14, 16, 20, 24, 28, 32, 40 ... that is not below a count: at most a quarter more."""
    step = max(1, 1 << (count - 1).bit_length() >> 3)
    return -(-count // step) * step


PACES = {
    "cpu": Pace(1, 0.8, int, lambda columns: columns + 16),  # copying the buffers costs about what a fifth of the rows cost in one step
    "cuda": Pace(16, 0.5, rounded_up, lambda columns: max(64, 2 * columns)),
}


class Decoder:
    """N rationales while they are written, those of a prompt side by side.

    A step depends on nothing that Python knows but shapes: the column, the rows that have finished and all that is written
    are tensors on the device. There may be more rows than rationales; those that are not in use write into row N of the
    results, which nobody reads.

    Attributes:
        ids, logprobs: [N + 1, R] int64 and float32; past a rationale's end anything.
        pooled: [N + 1, D] float32, of text and rationale so far (see `Pooling.begin`).
        prompt_pooled: [G, D] float32, of the prompts alone.
        prefixes: [N + 1, R + 1, D] float32, `pooled` after every token; R + 1 = 0 if not asked for.

    Args:
        counts: [G] int64, rationales of each prompt; N in all.
        draws: [N, R] uniform on [0, 1).
        temperatures: [N]; None: the likeliest token is taken.
        prefixes: whether `prefixes` are kept.
        buffers: hold the tensors.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        counts: Tensor,
        draws: Tensor,
        temperatures: Tensor | None,
        prefixes: bool,
        ends: Tensor,
        buffers: Buffers,
    ) -> None:
        device, (total, columns) = policy.device, draws.shape
        self.policy, self.pooling, self.pace = policy, POOLINGS[policy.pooling], PACES.get(device.type, PACES["cpu"])
        count = self.pace.bucket(len(prompts))
        groups, rows = _prompts_of_rows(counts, count, self.pace.bucket)
        groups = groups.to(device)
        self._total, size = total, rows + 1

        def kept(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return buffers(name, shape, dtype, device)

        self.head = _head(policy, buffers)
        self.ends = kept("ends", len(ends), dtype=torch.long).copy_(ends)
        lengths = torch.ones(count, dtype=torch.long).index_put_((torch.arange(len(prompts)),), prompts.lengths).to(device)
        longest = self.pace.bucket(int(prompts.lengths.max()))
        self.cache = SharedPromptCache(lengths, groups, rows, longest, columns, buffers, self.pace.bucket)
        last, self.prompt_pooled = self._read(prompts)
        # one entry a row from here on
        self.rows = kept("rows", size - 1, dtype=torch.long).copy_(torch.arange(size - 1).clamp(max=total))
        self.done = kept("done", size - 1, dtype=torch.bool).copy_(self.rows == total)  # waits to leave
        self.hidden = buffers("hidden", (size - 1, last.shape[1]), last.dtype, device)
        self.hidden[:total] = last[groups[:total]]
        self.draws = kept("draws", size, columns)
        self.draws[:total] = draws
        self.temperatures = None
        if temperatures is not None:
            self.temperatures = kept("temperatures", size, 1).fill_(1.0)
            self.temperatures[:total, 0] = temperatures
        self.ids, self.logprobs = kept("ids", size, columns, dtype=torch.long), kept("logprobs", size, columns)
        self.pooled = kept("pooled", size, self.prompt_pooled.shape[1])
        self.pooled[:total] = self.prompt_pooled[groups[:total]]
        self.prefixes = kept("prefixes", size, columns + 1 if prefixes else 0, self.pooled.shape[1])
        self.prefixes[:, :1] = self.pooled.unsqueeze(1)

    def _read(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Fills the cache with the prompts; returns their last states and their pooled states, [G, D] each."""
        policy, device, lengths = self.policy, self.policy.device, prompts.lengths.to(self.policy.device)
        ids = torch.nn.utils.rnn.pad_sequence(list(prompts.ids), batch_first=True, padding_value=policy.pad_id).to(device)
        positions = torch.arange(ids.shape[1], device=device)
        last, states = self._states(ids, positions.unsqueeze(0))
        self.cache.reading = False
        selected = (positions >= prompts.text_starts.to(device).unsqueeze(1)) & (positions < lengths.unsqueeze(1))
        return last[torch.arange(len(lengths), device=device), lengths - 1], self.pooling.begin(states, selected)

    def _states(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return states_at(
            self.policy.model.base_model,
            self.policy.layer,
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            rollout_cache=self.cache,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """All that a step depends on, but the contents of tensors and where they lie."""
        policy, device = self.policy, self.policy.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = (self.cache.shape, self.ids.shape, self.prefixes.shape, self.ends.shape, self.head.shape)
        return *shapes, self.temperatures is None, policy.pooling, policy.layer, autocast

    def step(self) -> None:
        """Writes a token to every row."""
        cache, rows, column = self.cache, self.rows, self.cache.column
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        ids, logprobs = choose(self.hidden, self.head, self.draws[rows, column], temperatures)
        self.ids[rows, column], self.logprobs[rows, column] = ids, logprobs
        last, states = self._states(ids.unsqueeze(1), cache.positions())
        self.hidden.copy_(last[:, 0])
        before = self.pooled[rows]
        pooled = torch.where(self.done.unsqueeze(1), before, self.pooling.extend(before, states[:, 0].float()))
        self.pooled[rows] = pooled
        if self.prefixes.shape[1]:
            self.prefixes[rows, column + 1] = pooled
        self.done |= (ids.unsqueeze(1) == self.ends).any(dim=1)
        column.add_(1)

    def write(self, run: Callable[[tuple[object, ...], Callable[[], None]], None]) -> None:
        """Takes steps until every row is finished or full, each by `run(key, step)`."""
        cache, pace, columns = self.cache, self.pace, self.ids.shape[1]
        for step in range(columns):
            if step == cache.used:
                cache.used = min(pace.longer(step), columns)
            if step and step % pace.check == 0:
                alive = int((~self.done).sum())
                if alive == 0:
                    break
                if pace.bucket(alive) <= pace.leave * len(self.rows):
                    self._leave((~self.done).nonzero().flatten())
            run(self.key, self.step)

    def _leave(self, alive: Tensor) -> None:
        """Drops all rows but these, ascending indices."""
        kept = self.cache.keep(alive)
        unused = torch.arange(len(kept), device=kept.device) >= len(alive)
        self.rows = front(self.rows, kept).masked_fill_(unused, self._total)
        self.hidden = front(self.hidden, kept)
        self.done = self.done[: len(kept)].copy_(unused)


def _prompts_of_rows(counts: Tensor, prompts: int, bucket: Callable[[int], int]) -> tuple[Tensor, int]:
    """Returns the prompt of each row, ascending, and the number of rows that buffers are made for.

    Where all of the `prompts` that buffers are made for have as many rows, attention need not gather the rows of a prompt.
    """
    n = int(counts.max())
    if bool((counts == n).all()):
        return torch.arange(prompts).repeat_interleave(n), prompts * n
    return torch.arange(len(counts)).repeat_interleave(counts), bucket(int(counts.sum()))


def _head(policy: Policy, buffers: Buffers) -> Tensor:
    """Returns the output embeddings as products with them are fastest: in autocast's dtype on a GPU, in float32 elsewhere."""
    head, device = policy.head, policy.device
    if device.type != "cuda":
        return head.float()
    if not torch.is_autocast_enabled(device.type):
        return head
    return buffers("head", head.shape, torch.get_autocast_dtype(device.type), device).copy_(head)


def choose(hidden: Tensor, weight: Tensor, draws: Tensor, temperatures: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chooses next tokens from states [N, D] and output embeddings [V, D]; returns [N] int64 and their float32 log-probs.

    By chunks of rows, in place of [N, V] logits. Inverse-transform sampling takes one uniform draw a row: noise over the
    whole vocabulary, as in `torch.multinomial`, took half of the time on a CPU.

    Args:
        draws: [N] uniform on [0, 1).
        temperatures: [N, 1]; None takes the likeliest tokens, with their log-probs at temperature 1.
    """
    device = hidden.device.type
    if temperatures is not None:
        hidden = (hidden / temperatures).to(hidden.dtype)  # [N, D] in place of [N, V]
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    chunk = tokens_at_a_time(len(weight), device)
    chosen, chosen_logprobs = [], []
    for h, d in zip(hidden.split(chunk), draws.split(chunk), strict=True):
        logits = logits_of(h, weight)
        if temperatures is not None:
            probabilities = torch.softmax(logits, dim=-1)
            cumulative = torch.cumsum(probabilities, dim=-1, out=logits)  # in their place
            # rounding may leave the last entry below 1: draws are taken relative to it
            targets = (d * cumulative[:, -1]).unsqueeze(1)
            ids = torch.searchsorted(cumulative, targets, right=True).clamp(max=len(weight) - 1)
            logprobs = probabilities.gather(1, ids).log()  # a token of probability 0 is never drawn
        else:
            ids = logits.argmax(dim=-1, keepdim=True)
            logprobs = logits.gather(1, ids) - logits.logsumexp(dim=-1, keepdim=True)
        chosen.append(ids.squeeze(1))
        chosen_logprobs.append(logprobs.squeeze(1))
    return torch.cat(chosen), torch.cat(chosen_logprobs)
