"""The in-process rollout engine: samples with the weights that are being trained, and pools as it samples.

The hidden state of a token depends on what stands before it alone, so the states met while a rationale is sampled are
those that an encode pass would compute again: log-probs and embeddings come with the rollouts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.modules.policy.attention.shared_cache import SharedPromptCache, decoding
from src.modules.policy.logprobs import tokens_at_a_time
from src.modules.policy.model import Policy
from src.modules.policy.pooling import POOLINGS, Pooling
from src.modules.policy.states import states_at
from src.modules.prompt.renderer import Prompts
from src.modules.types import Rollouts, join


@dataclass
class _Written:
    """What is known of N rationales while they are written: [N, R] ids and log-probs, [N] lengths, [N, D] pooled
    states (see `Pooling.begin`), those after every token, [N, R + 1, D] (R + 1 = 0 where nobody asks), and those of the
    prompts, [N, D]."""

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor
    pooled: Tensor
    prefix_pooled: Tensor
    prompt_pooled: Tensor


class HFEngine:
    """Samples rationales through the policy's own transformers model, so the sampler is the policy.

    Each distinct prompt is read once and shared by its rollouts; prompts of like lengths are read together; keys and values
    lie in preallocated buffers; rows that have finished leave the batch.

    Args:
        max_new_tokens: longest rationale, EOS included.
        batch_tokens: most tokens whose keys and values are held at once, a prompt's and `max_new_tokens` of each of its
            rationales. A prompt that alone has more stands alone.
    """

    def __init__(self, max_new_tokens: int, batch_tokens: int = 2**18) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens={max_new_tokens}: a rationale needs at least one token")
        if batch_tokens < 1:
            raise ValueError(f"rollout.batch_tokens={batch_tokens}: it must be at least 1")
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def generate(
        self, policy: Policy, prompts: Prompts, n: int = 1, temperature: float = 1.0, seed: int | Tensor = 0, prefixes: bool = False
    ) -> Rollouts:
        """n rationales for every prompt.

        Every rollout draws from random numbers of its own place, so the same seed and prompts give the same rationales
        whatever is sampled together (but for ties of rounding).

        Args:
            temperature: of sampling; 0 is greedy, for which n > 1 would repeat one rationale.
            seed: one for all, or [N] int64, one for each prompt.
            prefixes: give the embeddings after every token too.

        Returns:
            Rollouts on the policy's device with log-probs, and with embeddings where they come from the live model;
            rows i*n .. i*n + n - 1 belong to prompt i.
        """
        draws = uniform_draws(seed, len(prompts), n, self.max_new_tokens)
        ends = end_tokens(policy)
        was_training = policy.training
        policy.eval()
        parts, rows = [], []
        try:
            with decoding(policy.model):
                for chunk in batches(prompts.lengths, n * self.max_new_tokens, self.batch_tokens):
                    own = (chunk.unsqueeze(1) * n + torch.arange(n)).flatten()
                    parts.append(self._write(policy, prompts.select(chunk), n, temperature, draws[own], ends, prefixes))
                    rows.append(own)
        finally:
            policy.train(was_training)
        back = torch.cat(rows).argsort()
        written = _Written(*(torch.cat([getattr(part, name) for part in parts])[back] for name in _Written.__dataclass_fields__))
        return self._collect(policy, prompts.repeat(n), written)

    def _collect(self, policy: Policy, prompts: Prompts, written: _Written) -> Rollouts:
        lengths = written.lengths.tolist()
        rationales = [row[:length] for row, length in zip(written.ids, lengths, strict=True)]
        logprobs = [row[:length] for row, length in zip(written.logprobs, lengths, strict=True)]
        rollouts = join(prompts, rationales, written.finished, policy.pad_id, logprobs)
        if policy.frozen_encoder is None:
            counts, way = rollouts.lengths - rollouts.text_starts, POOLINGS[policy.pooling]
            embeddings, after_every = way.finish(written.pooled, counts), _after_every_token(written, counts, way)
            of_prompts = way.finish(written.prompt_pooled, rollouts.prompt_lengths - rollouts.text_starts)
            rollouts = replace(rollouts, embeddings=embeddings, prefix_embeddings=after_every, prompt_embeddings=of_prompts)
        return rollouts.to(policy.device)

    def _write(self, policy: Policy, prompts: Prompts, n: int, temperature: float, draws: Tensor, ends: Tensor, prefixes: bool) -> _Written:
        """The rationales of one batch of prompts, on the CPU."""
        device, backbone = policy.device, policy.model.base_model
        head, way = policy.model.get_output_embeddings().weight, POOLINGS[policy.pooling]
        draws, ends = draws.to(device), ends.to(device)
        total, limit = len(prompts) * n, self.max_new_tokens
        groups = torch.arange(len(prompts), device=device).repeat_interleave(n)
        cache = SharedPromptCache(groups, prompts.lengths.to(device), limit)
        last, pooled = _read_prompts(policy, prompts, cache)
        positions = prompts.lengths.to(device)[groups]
        out = _Written(
            ids=torch.zeros(total, limit, dtype=torch.long, device=device),
            logprobs=torch.zeros(total, limit, device=device),
            lengths=torch.full((total,), limit, device=device),
            finished=torch.zeros(total, dtype=torch.bool, device=device),
            pooled=pooled[groups],
            prefix_pooled=torch.empty(total, limit + 1 if prefixes else 0, pooled.shape[1], device=device),
            prompt_pooled=pooled[groups],
        )
        if prefixes:
            out.prefix_pooled[:, 0] = out.pooled
        rows = torch.arange(total, device=device)  # those that are still written
        done = torch.zeros_like(rows, dtype=torch.bool)  # of them, those that wait to leave
        hidden = last[groups]
        for step in range(limit):
            ids, logprobs = choose(hidden, head, draws[rows, step], temperature)
            out.ids[rows, step], out.logprobs[rows, step] = ids, logprobs
            cache.step = step
            last, states = states_at(
                backbone,
                policy.layer,
                input_ids=ids.unsqueeze(1),
                position_ids=(positions + step).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
                rollout_cache=cache,
            )
            hidden, before = last[:, 0], out.pooled[rows]
            out.pooled[rows] = torch.where(done.unsqueeze(1), before, way.extend(before, states[:, 0].float()))
            if prefixes:
                out.prefix_pooled[rows, step + 1] = out.pooled[rows]
            ended = torch.isin(ids, ends) & ~done
            out.lengths[rows[ended]] = step + 1
            out.finished[rows[ended]] = True
            done = done | ended
            # copying the buffers costs about what a fifth of the rows cost in one step
            if done.sum() * 5 >= len(rows):
                alive = (~done).nonzero().flatten()
                if len(alive) == 0:
                    break
                cache.keep(alive)
                rows, hidden, positions, done = rows[alive], hidden[alive], positions[alive], done[alive]
        return _Written(*(getattr(out, name).cpu() for name in _Written.__dataclass_fields__))


def _after_every_token(written: _Written, counts: Tensor, way: Pooling) -> Tensor | None:
    """[N, R + 1, D] embeddings after every token; `counts`, [N], is of the tokens that the whole embedding is pooled from."""
    if written.prefix_pooled.shape[1] == 0:
        return None
    tokens = torch.arange(written.prefix_pooled.shape[1]).minimum(written.lengths.unsqueeze(1))  # [N, R + 1]
    pooled = written.prefix_pooled.gather(1, tokens.unsqueeze(2).expand_as(written.prefix_pooled))
    return way.finish(pooled, (counts - written.lengths).unsqueeze(1) + tokens)


def _read_prompts(policy: Policy, prompts: Prompts, cache: SharedPromptCache) -> tuple[Tensor, Tensor]:
    """Fills the cache with the prompts; returns the last states [G, D], and what they pool to so far, [G, D] float32."""
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts.ids), batch_first=True, padding_value=policy.pad_id).to(policy.device)
    positions = torch.arange(ids.shape[1], device=policy.device)
    inputs = {"input_ids": ids, "position_ids": positions.unsqueeze(0), "past_key_values": cache, "use_cache": True, "rollout_cache": cache}
    last, states = states_at(policy.model.base_model, policy.layer, **inputs)
    lengths, prefixes = prompts.lengths.to(policy.device), prompts.text_starts.to(policy.device)
    selected = (positions >= prefixes.unsqueeze(1)) & (positions < lengths.unsqueeze(1))
    pooled = POOLINGS[policy.pooling].begin(states, selected)
    return last[torch.arange(len(lengths), device=policy.device), lengths - 1], pooled


def batches(lengths: Tensor, more: int, budget: int) -> Iterator[Tensor]:
    """Places of the lengths, [n_i] int64 each and the longest first: as many at a time as have `budget` tokens together, padded to
    the longest and with `more` tokens each; one at least."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        count = max(1, budget // (int(lengths[order[start]]) + more))
        yield order[start : start + count]
        start += count


def uniform_draws(seed: int | Tensor, prompts: int, n: int, steps: int) -> Tensor:
    """[prompts * n, steps] uniform on [0, 1): from one seed, or from one for each prompt, [prompts] int64."""
    generator = torch.Generator()
    if isinstance(seed, int):
        return torch.rand(prompts * n, steps, generator=generator.manual_seed(seed))
    return torch.cat([torch.rand(n, steps, generator=generator.manual_seed(own)) for own in seed.tolist()])


def choose(hidden: Tensor, weight: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Next tokens from states [N, D] and output embeddings [V, D], with their log-probs; [N] int64 and float32.

    Rows at a time, so that [N, V] never exists whole.

    Args:
        draws: [N] uniform on [0, 1).
        temperature: 0 takes the likeliest token and reports its log-prob at temperature 1.
    """
    rows, weight = tokens_at_a_time(len(weight), hidden.device.type), weight.to(hidden.dtype)
    parts = [_choose(h, weight, d, temperature) for h, d in zip(hidden.split(rows), draws.split(rows), strict=True)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _choose(hidden: Tensor, weight: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling: one uniform draw a row against the cumulative distribution. Noise over the whole
    vocabulary, as `torch.multinomial` draws it, took half of the time on a CPU."""
    if temperature > 0:
        logits = (hidden / temperature @ weight.T).float()  # [N, D] divided in place of [N, V]
        probabilities = torch.softmax(logits, dim=-1)
        cumulative = torch.cumsum(probabilities, dim=-1, out=logits)  # in their place
        # rounding may leave the last entry below 1: draws are taken relative to it
        targets = (draws * cumulative[:, -1]).unsqueeze(1)
        ids = torch.searchsorted(cumulative, targets, right=True).clamp(max=len(weight) - 1)
        return ids.squeeze(1), probabilities.gather(1, ids).squeeze(1).log()  # a token of probability 0 is never drawn
    logits = (hidden @ weight.T).float()
    ids = logits.argmax(dim=-1)
    return ids, logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)


def end_tokens(policy: Policy) -> Tensor:
    """[E] int64: every id that ends a rationale, the tokenizer's EOS and those of the model's generation config."""
    named = getattr(policy.model.generation_config, "eos_token_id", None)
    ids = {policy.tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])}
    return torch.tensor(sorted(ids))
