"""The in-process rollout engine: samples with the weights that are being trained, and pools as it samples.

The hidden state of a token depends on the tokens before it alone, so the states met in sampling are those that an encode
pass would compute again: log-probs and embeddings come with the rollouts.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule

from src.modules.policy.attention.masked import attention_set_to
from src.modules.policy.attention.shared_cache import SAMPLING_ATTENTION
from src.modules.policy.batching import padded_batches
from src.modules.policy.buffers import Buffers
from src.modules.policy.cast_weights import cast_weights
from src.modules.policy.model import Policy, evaluation_mode
from src.modules.policy.pooling import POOLINGS
from src.modules.prompt.renderer import Prompts, join_prompts
from src.modules.rollouts.decoder import Decoder
from src.modules.rollouts.engine import Request, end_tokens
from src.modules.rollouts.graphs import Graphs
from src.modules.types import Rollouts, join

LEAST_TOKENS, MOST_TOKENS = 2**14, 2**18
"""Of a budget from free memory: with fewer tokens at a time a GPU idles, and with more it writes no faster."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """N rationales, on the policy's device but for the prefixes, which are on the CPU.

    Attributes:
        ids, logprobs: [N, R] int64 and float32; past a rationale's end anything.
        pooled, prompt_pooled: [N, D] float32 of text and rationale, and of the prompt alone (see `Pooling.begin`).
        prefixes: [N, R + 1, D] float32, `pooled` after every token; R + 1 = 0 if not asked for.
    """

    ids: Tensor
    logprobs: Tensor
    pooled: Tensor
    prompt_pooled: Tensor
    prefixes: Tensor

    def put(self, rows: Tensor, decoder: Decoder, counts: Tensor) -> None:
        """Sets rows, [n] int64, to what a decoder has written; counts, [G] int64, are the rationales of each of its prompts."""
        own = rows.to(self.ids.device)
        self.ids[own], self.logprobs[own], self.pooled[own] = (x[: len(own)] for x in (decoder.ids, decoder.logprobs, decoder.pooled))
        self.prompt_pooled[own] = decoder.prompt_pooled.repeat_interleave(counts.to(own.device), dim=0)
        self.prefixes[rows] = decoder.prefixes[: len(rows)].cpu()

    def part(self, rows: slice) -> "_Written":
        """Returns some of the rationales."""
        return _Written(self.ids[rows], self.logprobs[rows], self.pooled[rows], self.prompt_pooled[rows], self.prefixes[rows])


class HFEngine:
    """Samples rationales through the policy's own transformers model, so the sampler is the policy.

    Each distinct prompt is read once and shared by its rollouts; prompts of like lengths are read together; keys and values
    lie in preallocated buffers; rows that have finished leave the batch. On a GPU a step is captured as a CUDA graph and
    replayed; graphs and buffers are kept from call to call.

    Args:
        max_new_tokens: longest rationale, EOS included.
        batch_tokens: most tokens whose keys and values are held at once, a prompt's and `max_new_tokens` of each of its
            rationales. A prompt that has more makes a batch alone. None: MOST_TOKENS, or fewer on a GPU that has less memory to spare
            at the first call (see `token_budget`).
        cuda_graphs: whether steps are captured on a GPU. Those of sharded weights, which move, never are.
        cast_weights: under autocast, casts the weights of linear layers once a call and not at every token, which takes
            2 bytes a weight. Sharded weights are not copied.
    """

    exact = True

    def __init__(self, max_new_tokens: int, batch_tokens: int | None = None, cuda_graphs: bool = True, cast_weights: bool = True) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens={max_new_tokens}: a rationale needs at least one token")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"rollout.batch_tokens={batch_tokens}: it must be at least 1, or null")
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens
        self.cuda_graphs = cuda_graphs
        self.cast_weights = cast_weights
        self._buffers = Buffers()
        self._graphs: Graphs | None = None
        self._addresses: tuple[int, ...] = ()  # of what the graphs read

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
        return HFEngine.generate_all(self, policy, [Request(prompts, n, temperature, seed, prefixes)])[0]

    def generate_all(self, policy: Policy, requests: Sequence[Request]) -> list[Rollouts]:
        """Answers requests as `generate` does, those of a kind in one loop: a step costs little more with more rows.

        Requests are of a kind if they sample, or do not, and if they want prefixes, or do not.
        """
        if self.batch_tokens is None:
            self.batch_tokens = token_budget(policy)  # once: another budget would be other shapes, and other graphs
        device, ends, graphs = policy.device, end_tokens(policy), self._captures(policy)
        buffers = self._buffers if graphs else Buffers()  # without graphs nothing has to keep its place
        autocast, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        answers: dict[int, Rollouts] = {}
        with (
            evaluation_mode(policy),
            attention_set_to(policy.model, SAMPLING_ATTENTION),
            # a cast that a capture puts into autocast's own cache would hold nothing
            torch.autocast(device.type, dtype, autocast, cache_enabled=False),
            cast_weights(policy.model.base_model, buffers) if self.cast_weights and not isinstance(policy, FSDPModule) else nullcontext(),
        ):
            kinds = [(request.temperature == 0, request.prefixes) for request in requests]
            for kind in dict.fromkeys(kinds):
                numbers = [number for number, own in enumerate(kinds) if own == kind]
                together = [requests[number] for number in numbers]
                written = self._write(policy, together, ends, buffers, graphs)
                answers |= zip(numbers, _answers(policy, together, written, ends), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _write(self, policy: Policy, requests: Sequence[Request], ends: Tensor, buffers: Buffers, graphs: bool) -> _Written:
        """Writes the rationales of requests of a kind, in batches of prompts of like lengths."""
        assert self.batch_tokens is not None
        prompts = join_prompts([request.prompts for request in requests])
        counts = torch.tensor([request.n for request in requests for _ in range(len(request.prompts))])
        total, limit, width, device = int(counts.sum()), self.max_new_tokens, policy.head.shape[1], policy.device
        prefixes = requests[0].prefixes
        out = _Written(
            ids=torch.zeros(total, limit, dtype=torch.long, device=device),
            logprobs=torch.zeros(total, limit, device=device),
            pooled=torch.empty(total, width, device=device),
            prompt_pooled=torch.empty(total, width, device=device),
            prefixes=torch.empty(total, limit + 1 if prefixes else 0, width),
        )
        draws = torch.cat([uniform_draws(r.seed, len(r.prompts), r.n, limit) for r in requests]).to(device)
        each = [torch.full((len(r.prompts) * r.n,), r.temperature) for r in requests]
        temperatures = None if requests[0].temperature == 0 else torch.cat(each).to(device)
        rows_of = torch.arange(total).split(counts.tolist())
        for chunk in padded_batches(prompts.lengths, self.batch_tokens, extra=counts * limit):
            rows = torch.cat([rows_of[prompt] for prompt in chunk.tolist()])
            own = None if temperatures is None else temperatures[rows.to(device)]
            decoder = Decoder(policy, prompts.select(chunk), counts[chunk], draws[rows.to(device)], own, prefixes, ends, buffers)
            # only now, as the decoder may have moved buffers that captured graphs read
            decoder.write(self._replay(policy, buffers) if graphs else lambda _, step: step())
            out.put(rows, decoder, counts[chunk])
        return out

    def _captures(self, policy: Policy) -> bool:
        return self.cuda_graphs and policy.device.type == "cuda" and not isinstance(policy, FSDPModule)

    def _replay(self, policy: Policy, buffers: Buffers) -> Callable[[tuple[object, ...], Callable[[], None]], None]:
        """Returns `Graphs.run`, without graphs of tensors that have moved."""
        tensors = (*policy.model.parameters(), *policy.model.buffers())
        disabled = (getattr(module, "disable_adapters", False) for module in policy.model.modules())
        addresses = (buffers.moves, *(tensor.data_ptr() for tensor in tensors), *disabled)
        if self._graphs is None or addresses != self._addresses:
            self._graphs, self._addresses = Graphs(policy.device), addresses
        return self._graphs.run


def token_budget(policy: Policy) -> int:
    """Returns MOST_TOKENS, or as many as half of a GPU's free memory has keys and values for.

    What the first update will add, gradients and AdamW's two moments, is not counted as free.
    """
    if policy.device.type != "cuda":
        return MOST_TOKENS
    unused = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    free = torch.cuda.mem_get_info(policy.device)[0] + unused
    budget = fitting_tokens(policy, free)
    if budget < MOST_TOKENS:
        log.info("rollout.batch_tokens=%d, as %.1f GiB of the GPU are free", budget, free / 2**30)
    return budget


def fitting_tokens(policy: Policy, free: int) -> int:
    """Returns how many tokens' keys and values fit into half of `free` bytes, after gradients and AdamW's moments.

    It is LEAST_TOKENS to MOST_TOKENS.
    """
    ranks = distributed.get_world_size() if isinstance(policy, FSDPModule) else 1  # each holds its share of gradients and moments
    trained = 12 * sum(weight.numel() for weight in policy.parameters() if weight.requires_grad and weight.grad is None) // ranks
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = 2 if torch.is_autocast_enabled(policy.device.type) else policy.head.dtype.itemsize
    token = 2 * config.num_hidden_layers * heads * width * itemsize
    return max(LEAST_TOKENS, min(MOST_TOKENS, (free - trained) // 2 // token))


def _answers(policy: Policy, requests: Sequence[Request], written: _Written, ends: Tensor) -> list[Rollouts]:
    """Returns the rollouts of each request."""
    answers, start = [], 0
    for request in requests:
        prompts = request.prompts.repeat(request.n)
        answers.append(_rollouts(policy, prompts, written.part(slice(start, start + len(prompts))), ends))
        start += len(prompts)
    return answers


def _rollouts(policy: Policy, prompts: Prompts, written: _Written, ends: Tensor) -> Rollouts:
    """Joins prompts, one a rationale, with the rationales; pooled states of the live model become embeddings."""
    ids, logprobs, device = written.ids.cpu(), written.logprobs.cpu(), policy.device
    ended = torch.isin(ids, ends)
    finished = ended.any(dim=1)
    lengths = torch.where(finished, ended.int().argmax(dim=1) + 1, ids.shape[1])
    own = lengths.tolist()
    rationales, own_logprobs = ([row[:length] for row, length in zip(rows, own, strict=True)] for rows in (ids, logprobs))
    rollouts = join(prompts, rationales, finished, policy.pad_id, own_logprobs).to(device)
    if policy.frozen_encoder is not None:
        return rollouts
    pooling, counts = POOLINGS[policy.pooling], prompts.lengths - prompts.text_starts
    prefix_embeddings = None
    if columns := written.prefixes.shape[1]:
        tokens = torch.arange(columns).minimum(lengths.unsqueeze(1))  # [N, R + 1]; past the end its last value is repeated
        pooled = written.prefixes[torch.arange(len(tokens)).unsqueeze(1), tokens]
        prefix_embeddings = pooling.finish(pooled, counts.unsqueeze(1) + tokens).to(device)
    return replace(
        rollouts,
        embeddings=pooling.finish(written.pooled, (counts + lengths).to(device)),
        prefix_embeddings=prefix_embeddings,
        prompt_embeddings=pooling.finish(written.prompt_pooled, counts.to(device)),
    )


def uniform_draws(seed: int | Tensor, prompts: int, n: int, steps: int) -> Tensor:
    """Draws [prompts * n, steps] uniform numbers on [0, 1) from one seed, or from one for each prompt, [prompts] int64."""
    generator = torch.Generator()
    if isinstance(seed, int):
        return torch.rand(prompts * n, steps, generator=generator.manual_seed(seed))
    return torch.cat([torch.rand(n, steps, generator=generator.manual_seed(own)) for own in seed.tolist()])
