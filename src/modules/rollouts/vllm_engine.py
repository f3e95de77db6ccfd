"""A vLLM engine in the trainer's process, started so that the trainer does not notice."""

import functools
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed, nn

from src.modules.rollouts.vllm_weights import push

log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """vLLM did not start, or died: what happened, and what to lower."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made for; policies whose specs are equal share one.

    Attributes:
        config: the model's config as JSON, its architecture included.
        max_model_len: tokens of the longest prompt and its rationale together.
        dtype, gpu_memory_utilization, cpu_kv_cache_gib, sleep, tensor_parallel: see VLLMEngine.
        extra: further arguments of `vllm.LLM`, as JSON.
        local_rank: which GPU of its machine this process has.
    """

    config: str
    max_model_len: int
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.3
    cpu_kv_cache_gib: float = 1.0
    sleep: bool = True
    tensor_parallel: int = 1
    extra: str = "{}"
    local_rank: int = 0


class Engine:
    """A running `vllm.LLM`. Its weights mean nothing but within `loaded`.

    Args:
        llm: the engine.
        on_cpu: whether it computes on the CPU.
        sleeps: whether it gives its memory back between rollouts.
    """

    def __init__(self, llm: Any, on_cpu: bool, sleeps: bool) -> None:
        self.llm, self.on_cpu, self.sleeps = llm, on_cpu, sleeps
        if sleeps:
            llm.sleep(level=2)

    @contextmanager
    def loaded(self, model: nn.Module) -> Iterator[Any]:
        """The `vllm.LLM`, awake and with the weights that `model` has now; asleep again afterwards.

        The weights come before the keys' memory, so that the two copies and the cache are never there at once.
        """
        if self.sleeps:
            torch.cuda.empty_cache()  # what the trainer only holds in reserve is out of vLLM's reach
            self.llm.wake_up(["weights"])
        push(self.llm, model)
        if self.sleeps:
            self.llm.wake_up(["kv_cache"])
        # vLLM compiles a few functions of its own even in eager mode; on a CPU that takes longer than it saves, and a compiler
        with torch.compiler.set_stance("force_eager") if self.on_cpu else nullcontext():
            yield self.llm
        if self.sleeps:
            self.llm.sleep(level=2)


def require_vllm() -> None:
    """Looks whether vLLM is there, without importing it.

    Raises:
        ImportError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "rollout=vllm needs vLLM, which is not installed: `make vllm` installs its build for the GPU, or without one for the CPU"
        )


@functools.cache
def start(spec: EngineSpec) -> Engine:
    """The engine of a spec, started once a process: vLLM gives all memory back only when its process ends.

    Raises:
        EngineError: it does not fit into memory, or vLLM refuses the settings.
    """
    log.info("starting vLLM, which takes up to a minute")
    with tempfile.TemporaryDirectory() as folder, _undisturbed_process(spec.local_rank):
        Path(folder, "config.json").write_text(spec.config, encoding="utf-8")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it reads that only after its imports have logged
        from vllm import LLM
        from vllm.platforms import current_platform

        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)  # a whole batch, when a step fails
        on_cpu = current_platform.is_cpu()
        try:
            llm = LLM(folder, **_arguments(spec, on_cpu))
        except (ValueError, torch.OutOfMemoryError) as error:
            raise EngineError(
                f"vLLM cannot start ({one_line(error)}). If memory is short, lower rollout.max_new_tokens or module.max_prompt_tokens, "
                "or change rollout.gpu_memory_utilization, on a CPU rollout.cpu_kv_cache_gib"
            ) from error
    return Engine(llm, on_cpu, spec.sleep and not on_cpu)


def _arguments(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "load_format": "dummy",  # the weights come from the trainer
        "skip_tokenizer_init": True,  # ids go in, ids come out
        "generation_config": "vllm",  # no top-p or the like that a model's folder asks for
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from, temperature included
        "max_model_len": spec.max_model_len,
        "dtype": {"auto": "float32" if on_cpu else "bfloat16"}.get(spec.dtype, spec.dtype),
        "tensor_parallel_size": spec.tensor_parallel,
    }
    if on_cpu:
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(spec.cpu_kv_cache_gib * 2**30),
            "block_size": 32,  # the least that its attention takes: only whole blocks of a prompt are shared by its rollouts
            # a seeded request whose prompt is read in parts fails on the CPU ("CPU Generator does not use offset")
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, spec.max_model_len),
        }
    else:
        arguments |= {"gpu_memory_utilization": spec.gpu_memory_utilization, "enable_sleep_mode": spec.sleep}
    if _processes() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    return arguments | json.loads(spec.extra)


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def one_line(error: BaseException, limit: int = 400) -> str:
    """An error's text without line breaks, and not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def _undisturbed_process(local_rank: int) -> Iterator[None]:
    """Leaves random states, threads and environment as they were: vLLM takes the whole process for its own.

    It seeds every generator, sets torch to one thread (on a CPU it takes away `torch.set_num_threads`), and tells every
    child process to preload its libraries.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every push
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    before, threads, set_num_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    if _processes() > 1:  # what it reads from a launcher's environment; Lightning's has not all of it
        os.environ |= {"RANK": str(distributed.get_rank()), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(_processes())}
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
