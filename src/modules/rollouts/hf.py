"""The in-process rollout engine: samples with the weights that are being trained, and pools as it samples.

The hidden state of a token depends on the tokens before it alone, so the states met in sampling are those that an encode
pass would compute again: log-probs and embeddings come with the rollouts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.modules.policy.attention.shared_cache import SAMPLING_ATTENTION, SharedPromptCache
from src.modules.policy.attention.shared_prompt import attention_set_to
from src.modules.policy.batching import padded_batches
from src.modules.policy.logprobs import tokens_at_a_time
from src.modules.policy.model import Policy, evaluation_mode
from src.modules.policy.pooling import POOLINGS, states_at
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.engine import end_tokens
from src.modules.types import Rollouts, join


@dataclass(frozen=True)
class _Written:
    """N rationales while they are written, on the policy's device.

    Attributes:
        ids, logprobs: [N, R] int64 and float32.
        lengths, finished: [N] int64 and bool.
        pooled, prompt_pooled: [N, D] float32 of text and rationale so far, and of the prompt alone (see `Pooling.begin`).
        prefix_pooled: [N, R + 1, D] float32 on the CPU, `pooled` after every token; R + 1 = 0 if not asked for.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor
    pooled: Tensor
    prompt_pooled: Tensor
    prefix_pooled: Tensor


class HFEngine:
    """Samples rationales through the policy's own transformers model, so the sampler is the policy.

    Each distinct prompt is read once and shared by its rollouts; prompts of like lengths are read together; keys and values
    lie in preallocated buffers; rows that have finished leave the batch.

    Args:
        max_new_tokens: longest rationale, EOS included.
        batch_tokens: most tokens whose keys and values are held at once, a prompt's and `max_new_tokens` of each of its
            rationales. A prompt that has more makes a batch alone.
    """

    exact = True

    def __init__(self, max_new_tokens: int, batch_tokens: int = 2**18) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens={max_new_tokens}: a rationale needs at least one token")
        if batch_tokens < 1:
            raise ValueError(f"rollout.batch_tokens={batch_tokens}: it must be at least 1")
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens

    def generate(
        self, policy: Policy, prompts: Prompts, n: int = 1, temperature: float = 1.0, seed: int | Tensor = 0, prefixes: bool = False
    ) -> Rollouts:
        """Writes n rationales for every prompt.

        Every rollout has its own random numbers, so the same seed and prompts give the same rationales whatever is sampled
        together (but for ties of rounding).

        Args:
            temperature: of sampling; 0 is greedy, for which n > 1 would repeat one rationale.
            seed: one for all, or [N] int64, one for each prompt.
            prefixes: also gives the embeddings after every token.

        Returns:
            Rollouts on the policy's device with log-probs, and, unless the encoder is frozen, with embeddings; rows
            i*n .. i*n + n - 1 belong to prompt i.
        """
        total, limit, device = len(prompts) * n, self.max_new_tokens, policy.device
        width = policy.model.get_output_embeddings().weight.shape[1]
        draws = uniform_draws(seed, len(prompts), n, limit).to(device)
        out = _Written(
            ids=torch.zeros(total, limit, dtype=torch.long, device=device),
            logprobs=torch.zeros(total, limit, device=device),
            lengths=torch.full((total,), limit, device=device),
            finished=torch.zeros(total, dtype=torch.bool, device=device),
            pooled=torch.empty(total, width, device=device),
            prompt_pooled=torch.empty(total, width, device=device),
            prefix_pooled=torch.empty(total, limit + 1 if prefixes else 0, width),
        )
        with evaluation_mode(policy), attention_set_to(policy.model, SAMPLING_ATTENTION):
            for chunk in padded_batches(prompts.lengths, self.batch_tokens, extra=n * limit):
                rows = (chunk.unsqueeze(1) * n + torch.arange(n)).flatten().to(device)
                self._write(policy, prompts.select(chunk), n, temperature, draws, rows, out)
        return _rollouts(policy, prompts.repeat(n), out)

    def _write(self, policy: Policy, prompts: Prompts, n: int, temperature: float, draws: Tensor, rows: Tensor, out: _Written) -> None:
        """Writes the rationales of one batch of prompts into `rows`, [len(prompts) * n] int64, of `out`."""
        head, pooling = policy.model.get_output_embeddings().weight, POOLINGS[policy.pooling]
        ends = end_tokens(policy).to(rows.device)
        lengths = prompts.lengths.to(rows.device)
        cache = SharedPromptCache(lengths, n, self.max_new_tokens)
        last, pooled = _read_prompts(policy, prompts, cache)
        # one entry a row from here on
        hidden, positions, every = last[cache.groups], lengths[cache.groups], rows
        out.pooled[rows] = out.prompt_pooled[rows] = pooled[cache.groups]
        prefix_pooled = out.pooled.new_empty(len(rows), *out.prefix_pooled.shape[1:])
        prefix_pooled[:, :1] = out.pooled[rows].unsqueeze(1)
        done = torch.zeros_like(rows, dtype=torch.bool)  # rows that wait to leave
        for step in range(self.max_new_tokens):
            ids, logprobs = choose(hidden, head, draws[rows, step], temperature)
            out.ids[rows, step], out.logprobs[rows, step] = ids, logprobs
            cache.step = step
            last, states = states_at(
                policy.model.base_model,
                policy.layer,
                input_ids=ids.unsqueeze(1),
                position_ids=(positions + step).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
                rollout_cache=cache,
            )
            hidden, before = last[:, 0], out.pooled[rows]
            out.pooled[rows] = torch.where(done.unsqueeze(1), before, pooling.extend(before, states[:, 0].float()))
            # of all rows: past a rationale's end its last value is repeated
            prefix_pooled[:, step + 1 : step + 2] = out.pooled[every].unsqueeze(1)
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
        prefix_pooled[:, step + 2 :] = out.pooled[every].unsqueeze(1)
        out.prefix_pooled[every.cpu()] = prefix_pooled.cpu()


def _read_prompts(policy: Policy, prompts: Prompts, cache: SharedPromptCache) -> tuple[Tensor, Tensor]:
    """Fills the cache with the prompts; returns their last states and their pooled states, [G, D] each."""
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts.ids), batch_first=True, padding_value=policy.pad_id).to(policy.device)
    positions, ends = torch.arange(ids.shape[1], device=policy.device), cache.prompt_lengths
    inputs = {"input_ids": ids, "position_ids": positions.unsqueeze(0), "past_key_values": cache, "use_cache": True, "rollout_cache": cache}
    last, states = states_at(policy.model.base_model, policy.layer, **inputs)
    selected = (positions >= prompts.text_starts.to(policy.device).unsqueeze(1)) & (positions < ends.unsqueeze(1))
    return last[torch.arange(len(ends), device=policy.device), ends - 1], POOLINGS[policy.pooling].begin(states, selected)


def _rollouts(policy: Policy, prompts: Prompts, written: _Written) -> Rollouts:
    """Joins prompts, one a rationale, with the rationales; pooled states of the live model become embeddings."""
    lengths, ids, logprobs = written.lengths.cpu(), written.ids.cpu(), written.logprobs.cpu()
    own = lengths.tolist()
    rationales, own_logprobs = ([row[:length] for row, length in zip(rows, own, strict=True)] for rows in (ids, logprobs))
    rollouts = join(prompts, rationales, written.finished.cpu(), policy.pad_id, own_logprobs).to(policy.device)
    if policy.frozen_encoder is not None:
        return rollouts
    pooling, counts = POOLINGS[policy.pooling], prompts.lengths - prompts.text_starts
    columns = written.prefix_pooled.shape[1]
    tokens = torch.arange(columns).minimum(lengths.unsqueeze(1))  # [N, R + 1]
    prefix_embeddings = pooling.finish(written.prefix_pooled, counts.unsqueeze(1) + tokens).to(policy.device) if columns else None
    counts = counts.to(policy.device)
    return replace(
        rollouts,
        embeddings=pooling.finish(written.pooled, counts + written.lengths),
        prefix_embeddings=prefix_embeddings,
        prompt_embeddings=pooling.finish(written.prompt_pooled, counts),
    )


def uniform_draws(seed: int | Tensor, prompts: int, n: int, steps: int) -> Tensor:
    """Draws [prompts * n, steps] uniform numbers on [0, 1) from one seed, or from one for each prompt, [prompts] int64."""
    generator = torch.Generator()
    if isinstance(seed, int):
        return torch.rand(prompts * n, steps, generator=generator.manual_seed(seed))
    return torch.cat([torch.rand(n, steps, generator=generator.manual_seed(own)) for own in seed.tolist()])


def choose(hidden: Tensor, weight: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Chooses next tokens from states [N, D] and output embeddings [V, D]; returns [N] int64 and their float32 log-probs.

    By chunks of rows, in place of [N, V] logits. Inverse-transform sampling takes one uniform draw a row: noise over the
    whole vocabulary, as in `torch.multinomial`, took half of the time on a CPU.

    Args:
        draws: [N] uniform on [0, 1).
        temperature: 0 takes the likeliest token, with its log-prob at temperature 1.
    """
    chunk, weight = tokens_at_a_time(len(weight), hidden.device.type), weight.to(hidden.dtype)
    chosen, chosen_logprobs = [], []
    for h, d in zip(hidden.split(chunk), draws.split(chunk), strict=True):
        if temperature > 0:
            logits = (h / temperature @ weight.T).float()  # [n, D] divided in place of [n, V]
            probabilities = torch.softmax(logits, dim=-1)
            cumulative = torch.cumsum(probabilities, dim=-1, out=logits)  # in their place
            # rounding may leave the last entry below 1: draws are taken relative to it
            targets = (d * cumulative[:, -1]).unsqueeze(1)
            ids = torch.searchsorted(cumulative, targets, right=True).clamp(max=len(weight) - 1)
            logprobs = probabilities.gather(1, ids).log()  # a token of probability 0 is never drawn
        else:
            logits = (h @ weight.T).float()
            ids = logits.argmax(dim=-1, keepdim=True)
            logprobs = logits.gather(1, ids) - logits.logsumexp(dim=-1, keepdim=True)
        chosen.append(ids.squeeze(1))
        chosen_logprobs.append(logprobs.squeeze(1))
    return torch.cat(chosen), torch.cat(chosen_logprobs)
