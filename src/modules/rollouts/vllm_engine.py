"""A vLLM engine in the trainer's process: it starts without side effects on the trainer, takes over its weights, and checks them."""

import copy
import functools
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from src.modules.policy.model import Policy, evaluation_mode
from src.modules.prompt.renderer import Prompts
from src.modules.types import without_rationales

log = logging.getLogger(__name__)


KNOWN_TEXT = "The quick brown fox jumps over the lazy dog, and 12 grey wolves watch it from the other side of the river."
"""Whose log-probs by the engine and by the policy are compared after every copy of the weights."""

TOLERANCES = {"float32": 2e-3, "float16": 0.03, "bfloat16": 0.15}
"""By the engine's dtype, nats: the mean difference of those log-probs that rounding does not explain (measured: 1e-5, and 0.02 to 0.07 in
bfloat16)."""


class EngineError(RuntimeError):
    """vLLM did not start, died, or has other weights than the policy; the message says what to do."""


class Engine:
    """A running `vllm.LLM`. Its weights are valid within `loaded` alone.

    Args:
        llm: the engine.
        on_cpu: it computes on the CPU.
        sleeps: it gives its memory back between rollouts.
    """

    def __init__(self, llm: Any, on_cpu: bool, sleeps: bool) -> None:
        self.llm, self.on_cpu, self.sleeps = llm, on_cpu, sleeps
        if sleeps:
            llm.sleep(level=2)

    @contextmanager
    def loaded(self, policy: Policy) -> Iterator[Any]:
        """Yields the `vllm.LLM`, awake and with the present weights of the policy; it sleeps again at the end.

        The weights come before the keys' memory, so that both copies and the cache are never there at once.

        Raises:
            EngineError: its log-probs of a known text are not the policy's.
        """
        if self.sleeps:
            torch.cuda.empty_cache()  # vLLM cannot use memory that the trainer only holds in reserve
            self.llm.wake_up(["weights"])
        try:
            push(self.llm, policy.model)
            if self.sleeps:
                self.llm.wake_up(["kv_cache"])
            # vLLM compiles a few functions even in eager mode; on a CPU that needs a compiler and takes longer than it saves
            with torch.compiler.set_stance("force_eager") if self.on_cpu else nullcontext():
                require_same_weights(self.llm, policy)
                yield self.llm
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)


def vocabulary_of(policy: Policy) -> int:
    """Returns the number of tokens that are sampled from: up to the tokenizer's last, as further rows are padding."""
    rows = int(policy.model.get_output_embeddings().weight.shape[0])
    return min(rows, _last_token(policy.tokenizer) + 1)


@functools.lru_cache(maxsize=8)
def _last_token(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values())  # more than its length where ids have gaps


@torch.no_grad()
def require_same_weights(llm: Any, policy: Policy) -> None:
    """Compares log-probs of a known text, by the engine and by a plain pass of the policy.

    It finds weights that were never copied, a layer that was left out, and adapters that have learned much and were not merged. A copy that
    is some hundred small steps old is below the tolerance of a bfloat16 engine.

    Raises:
        EngineError: they differ by more than rounding explains.
    """
    from vllm import SamplingParams

    vocabulary, dtype = llm.model_config.get_vocab_size(), str(llm.model_config.dtype).removeprefix("torch.")
    ids = torch.tensor(policy.tokenizer(KNOWN_TEXT, add_special_tokens=False)["input_ids"][: llm.model_config.max_model_len - 1])
    asked = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids.tolist()}], [asked], use_tqdm=False)
    theirs = torch.tensor([found[own].logprob for found, own in zip(output.prompt_logprobs[1:], ids[1:].tolist(), strict=True)])
    prompts = Prompts((ids,), torch.zeros(1, dtype=torch.long), torch.tensor([len(ids)]))
    head: Any = policy.model.get_output_embeddings()
    with evaluation_mode(policy):
        states = policy.hidden_states(without_rationales(prompts, policy.pad_id).to(policy.device))[0, :-1]
        logits = head(states)[:, :vocabulary].float().cpu()
    ours = logits.log_softmax(dim=-1).gather(1, ids[1:].unsqueeze(1)).squeeze(1)
    difference, tolerance = float((theirs - ours).abs().mean()), TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if not difference <= tolerance:
        raise EngineError(
            f"vLLM does not sample from the policy's weights: log-probs of a known text differ by {difference:.2g} nats a token, where "
            f"rounding in {dtype} explains {tolerance:g}. This is an error of the copy, or of vLLM's own {type(policy.model).__name__}: "
            "use rollout=hf, and report it"
        )


def require_vllm() -> None:
    """Raises ImportError if vLLM is not installed, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "rollout=vllm needs vLLM, which is not installed: `make vllm` installs its build for the GPU, or without one for the CPU"
        )


@functools.cache
def start(
    config: str,
    max_model_len: int,
    dtype: str,
    gpu_memory_utilization: float,
    cpu_kv_cache_gib: float,
    sleep: bool,
    tensor_parallel: int,
    extra: str,
    device: str,
) -> Engine:
    """Starts an engine, once a process for the same arguments: vLLM gives all memory back only when its process ends.

    Args:
        config: the model's config as JSON, its architecture included.
        max_model_len: tokens of the longest prompt and its rationale together.
        dtype, gpu_memory_utilization, cpu_kv_cache_gib, sleep, tensor_parallel: see VLLMEngine.
        extra: further arguments of `vllm.LLM`, as JSON.
        device: of the policy, such as `cuda:2`; the engine takes the same.

    Raises:
        EngineError: it does not fit into memory, vLLM rejects the settings, or it takes another device.
    """
    log.info("starting vLLM, which takes up to a minute")
    local_rank = torch.device(device).index or 0
    with tempfile.TemporaryDirectory() as folder, _undisturbed_process(local_rank):
        Path(folder, "config.json").write_text(config, encoding="utf-8")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it reads that only after its imports have logged
        from vllm import LLM
        from vllm.platforms import current_platform

        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)  # it dumps the batch when a step fails
        on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "load_format": "dummy",  # the weights come from the trainer
            "skip_tokenizer_init": True,  # ids go in, ids come out
            "generation_config": "vllm",  # no top-p or the like that a model's folder asks for
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from, temperature included
            "max_model_len": max_model_len,
            "dtype": {"auto": "float32" if on_cpu else "bfloat16"}.get(dtype, dtype),
            "tensor_parallel_size": tensor_parallel,
        }
        if on_cpu:
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": int(cpu_kv_cache_gib * 2**30),
                "block_size": 32,  # the least that its attention takes: only full blocks of a prompt are shared by its rollouts
                # a seeded request whose prompt is read in parts fails on the CPU ("CPU Generator does not use offset")
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_model_len),
            }
        else:
            arguments |= {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": sleep}
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            arguments["distributed_executor_backend"] = "external_launcher"  # which takes the device from LOCAL_RANK
        elif not on_cpu and local_rank:
            arguments["device_ids"] = [local_rank]  # of the visible ones; it takes the first by itself
        try:
            llm = LLM(folder, **(arguments | json.loads(extra)))
        except (ValueError, AssertionError, torch.OutOfMemoryError) as error:
            advice = (
                "If memory is short, lower rollout.max_new_tokens or module.max_prompt_tokens, or change "
                "rollout.gpu_memory_utilization, on a CPU rollout.cpu_kv_cache_gib"
            )
            if "one instance per process" in str(error):
                advice = "A process has one engine that sleeps: set rollout.sleep=false, or evaluate another policy in a process of its own"
            raise EngineError(f"vLLM cannot start ({one_line(error)}). {advice}") from error
    require_device(llm, torch.device(device))
    return Engine(llm, on_cpu, sleep and not on_cpu)


def require_device(llm: Any, device: torch.device) -> None:
    """Raises EngineError if a `vllm.LLM` computes elsewhere than the policy, on `device`."""
    (found,) = {str(weight) for weight in llm.apply_model(lambda model: next(model.parameters()).device)}
    if torch.device(found) != device:
        raise EngineError(
            f"vLLM took {found}, and the policy is on {device}: hide the other devices (CUDA_VISIBLE_DEVICES={device.index or 0} "
            "and trainer.devices=1), or use rollout=hf"
        )


def one_line(error: BaseException, limit: int = 400) -> str:
    """Returns an error's text without line breaks, cut at `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def _undisturbed_process(local_rank: int) -> Iterator[None]:
    """Restores random states, threads and environment, which vLLM changes for the process.

    It seeds every generator, sets torch to one thread (on a CPU it replaces `torch.set_num_threads`), and makes every child
    process preload its libraries.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every push
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    before, threads, set_num_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    if distributed.is_initialized() and distributed.get_world_size() > 1:  # of a launcher's environment Lightning's has not all
        rank, size = distributed.get_rank(), distributed.get_world_size()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    try:
        with isolate_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name in [name for name in os.environ if name not in before and not name.startswith("VLLM_")]:
            del os.environ[name]
        os.environ |= before


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight once, under its name in a checkpoint of the model without adapters; tied ones under the first name.

    LoRA layers are merged into copies, one at a time: merged in place and taken back out, the frozen weights would move
    by a rounding error at every rollout batch.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)
    for name, weight in model.named_parameters():
        if not name.startswith(inside):
            yield name, weight.detach()
    for name, module in adapted.items():
        layer: Any = copy.deepcopy(module)
        if not layer.disable_adapters:
            layer.merge()
        for own, weight in layer.get_base_layer().named_parameters():
            yield f"{name}.{own}", weight.detach()


def push(llm: Any, model: PreTrainedModel) -> None:
    """Copies the weights of a model into a `vllm.LLM`, without the disk, and drops the keys and values of the old ones.

    Rows of the embeddings beyond the engine's vocabulary are left out.

    Raises RuntimeError if a request is still running, so that its keys and values cannot be dropped.
    """
    # vLLM's own loader takes checkpoint names, fuses and shards as the engine needs, and casts on copy; without an iterator
    # it would read the weights from disk
    vocabulary = llm.model_config.get_vocab_size()
    tables = {f"{n}.weight" for n, part in model.named_modules() if part in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = ((name, weight[:vocabulary] if name in tables else weight) for name, weight in named_weights(model))
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.apply_model(_repack_head)
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefix cache: a request of an earlier rollout batch is still running")


def _repack_head(model: nn.Module) -> None:
    """Packs the output layer again: on a CPU a reload leaves its packed copy stale if it is tied to the embeddings."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
