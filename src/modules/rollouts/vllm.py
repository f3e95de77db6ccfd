"""The vLLM rollout engine: samples with a copy of the trainer's weights that is made anew before every batch."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed

from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.engine import Request, end_tokens
from src.modules.rollouts.vllm_engine import Engine, EngineError, one_line, require_vllm, start, vocabulary_of
from src.modules.types import Rollouts, join


class VLLMEngine:
    """Samples rationales through vLLM, in this process.

    The policy's weights are copied at every call (within `holding` once) and compared with the policy's, so no stale copy is
    sampled from. vLLM starts at the first call. It gives no hidden states, so an encode pass computes the embeddings. Tokens
    that the tokenizer does not have, whose rows pad the embeddings of some models, are never sampled.

    Args:
        max_new_tokens: longest rationale, EOS included.
        max_prompt_tokens: longest prompt; the engine holds both.
        dtype: of the engine's weights and arithmetic: `auto` is bfloat16 on a GPU and float32 on a CPU.
        gpu_memory_utilization: share of the GPU that the engine may take beside the trainer.
        cpu_kv_cache_gib: on a CPU, memory for keys and values, in GiB.
        sleep: on a GPU, gives the memory back while the trainer updates.
        tensor_parallel: processes that an engine is divided over; each of them writes for the prompts of all.
        extra: any further arguments of `vllm.LLM`.

    Raises:
        ValueError: a length or a number out of range.
        ImportError: vLLM is not installed.
    """

    exact = False

    def __init__(
        self,
        max_new_tokens: int,
        max_prompt_tokens: int = 1024,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.3,
        cpu_kv_cache_gib: float = 1.0,
        sleep: bool = True,
        tensor_parallel: int = 1,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"rollout.max_new_tokens={max_new_tokens}: a rationale needs at least one token")
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("tensor_parallel", tensor_parallel)):
            if value < 1:
                raise ValueError(f"rollout.{name}={value}: it must be at least 1")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"rollout.gpu_memory_utilization={gpu_memory_utilization}: it is a share, above 0 and at most 1")
        require_vllm()
        # public names: the embedding cache's key reads them
        self.max_new_tokens, self.max_prompt_tokens, self.dtype = max_new_tokens, max_prompt_tokens, dtype
        self.gpu_memory_utilization, self.cpu_kv_cache_gib, self.sleep = gpu_memory_utilization, cpu_kv_cache_gib, sleep
        self.tensor_parallel, self.extra = tensor_parallel, dict(extra or {})
        self._held: Any = None

    @contextmanager
    def holding(self, policy: Policy) -> Iterator[None]:
        """Keeps the engine awake with the policy's present weights: for many calls between which these do not change."""
        with isolate_rng(), ExitStack() as stack:
            with torch.autocast(policy.device.type, enabled=False), _plain_errors():
                self._held = stack.enter_context(self.started(policy).loaded(policy))
            try:
                yield
            finally:
                self._held = None

    def generate(
        self, policy: Policy, prompts: Prompts, n: int = 1, temperature: float = 1.0, seed: int | Tensor = 0, prefixes: bool = False
    ) -> Rollouts:
        """Writes n rationales for every prompt, with the policy's present weights.

        The same seed, prompts and weights give the same rationales; unless greedy, they differ from those of HFEngine.
        Random states do not change.

        Args:
            temperature: of sampling; 0 is greedy, with log-probs at temperature 1, and n > 1 then repeats one rationale.
            seed: one for all, or [N] int64, one for each prompt.
            prefixes: has no effect: an encode pass computes these embeddings too.

        Returns:
            Rollouts on the policy's device with log-probs, without embeddings; rows i*n .. i*n + n - 1 belong to prompt i.

        Raises:
            ValueError: a prompt that leaves no room for a rationale.
            EngineError: vLLM cannot start, died, or has other weights than the policy.
        """
        return self.generate_all(policy, [Request(prompts, n, temperature, seed)])[0]

    @torch.no_grad()
    def generate_all(self, policy: Policy, requests: Sequence[Request]) -> list[Rollouts]:
        """Returns what `generate` returns for each request; the weights are copied once, and vLLM writes all of them together."""
        longest, limit = max(int(request.prompts.lengths.max()) for request in requests), self._limit(policy)
        if longest >= limit:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for a rationale: vLLM was set up for {limit} tokens of both. "
                "Raise rollout.max_prompt_tokens if the policy's context is longer, or lower module.max_prompt_tokens"
            )
        with isolate_rng(), torch.autocast(policy.device.type, enabled=False), _plain_errors(), ExitStack() as stack:
            llm = self._held or stack.enter_context(self.started(policy).loaded(policy))
            asked = [self._asked(policy, request) for request in requests]
            outputs = iter(self._run(llm, [one for part in asked for one in part]))
        return [_joined(policy, request, [next(outputs) for _ in part]) for request, part in zip(requests, asked, strict=True)]

    def started(self, policy: Policy) -> Engine:
        """Returns the running engine of policies like this one."""
        config = copy.deepcopy(policy.model.config)
        config.architectures, config.name_or_path = [type(policy.model).__name__], ""
        config.get_text_config().vocab_size = vocabulary_of(policy)
        return start(
            config=config.to_json_string(),
            max_model_len=self._limit(policy),
            dtype=self.dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
            cpu_kv_cache_gib=self.cpu_kv_cache_gib,
            sleep=self.sleep,
            tensor_parallel=self.tensor_parallel,
            extra=json.dumps(self.extra, sort_keys=True),
            device=str(policy.device),
        )

    def _limit(self, policy: Policy) -> int:
        """Returns the most tokens of a prompt and its rationale together."""
        wanted = self.max_prompt_tokens + self.max_new_tokens
        return min(wanted, policy.context or wanted)

    def _asked(self, policy: Policy, request: Request) -> list[tuple[Any, Any]]:
        """Returns a prompt and its sampling parameters each; rollout k of a prompt draws from the prompt's seed plus k.

        A greedy prompt stands there n times, as vLLM takes no n > 1 then.
        """
        from vllm import SamplingParams

        prompts, n, seed = request.prompts, request.n, request.seed
        if isinstance(seed, int):
            seed = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(seed))
        if request.temperature == 0:
            prompts, seed, n = prompts.repeat(n), seed.repeat_interleave(n), 1
        ends = [token for token in end_tokens(policy).tolist() if token < len(policy.head)]  # vLLM refuses what it never draws
        common: dict[str, Any] = {"n": n, "temperature": request.temperature, "stop_token_ids": ends}
        common |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}  # log-probs of the sampled token alone
        rooms = (self._limit(policy) - prompts.lengths).clamp(max=self.max_new_tokens)
        return [
            ({"prompt_token_ids": ids.tolist()}, SamplingParams(seed=own, max_tokens=room, **common))
            for ids, own, room in zip(prompts.ids, seed.tolist(), rooms.tolist(), strict=True)
        ]

    def _run(self, llm: Any, requests: list[tuple[Any, Any]]) -> list[Any]:
        """Returns the outputs of this process's requests. The processes of one engine must all give it the same requests."""
        own = slice(0, len(requests))
        if self.tensor_parallel > 1:
            from vllm.distributed.parallel_state import get_tp_group

            group = get_tp_group()
            parts: list[list[tuple[Any, Any]]] = [[] for _ in range(group.world_size)]
            distributed.all_gather_object(parts, requests, group=group.cpu_group)
            first = sum(len(part) for part in parts[: group.rank_in_group])
            own, requests = slice(first, first + len(requests)), [request for part in parts for request in part]
        prompts, params = zip(*requests, strict=True)
        outputs: list[Any] = llm.generate(list(prompts), list(params), use_tqdm=False)
        return outputs[own]


def _joined(policy: Policy, request: Request, outputs: Sequence[Any]) -> Rollouts:
    """Joins the prompts of a request with what vLLM wrote for them."""
    written = [completion for output in outputs for completion in output.outputs]
    return join(
        request.prompts.repeat(request.n),
        [torch.tensor(list(completion.token_ids)) for completion in written],
        torch.tensor([completion.finish_reason == "stop" for completion in written]),
        policy.pad_id,
        [torch.tensor(completion.logprobs.logprobs) for completion in written],
    ).to(policy.device)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns the engine's errors into one line that says which setting to lower; the next call starts a new engine."""
    try:
        yield
    except (_server_error(), torch.OutOfMemoryError) as error:  # looked up when there is an error: before its start vLLM is not imported
        start.cache_clear()
        raise EngineError(
            f"vLLM died while it wrote rationales ({one_line(error)}). If memory was short, lower rollout.gpu_memory_utilization, "
            "module.num_generations or rollout.max_new_tokens; ckpt_path=<run>/checkpoints/last.ckpt goes on from the last checkpoint"
        ) from error


def _server_error() -> type[Exception]:
    from vllm.exceptions import VLLMServerError

    return VLLMServerError
