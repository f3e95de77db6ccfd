"""The machine that a run finds: its choices in configs, and how long a run will take on it."""

import time

import torch
from omegaconf import OmegaConf


def has_gpu() -> bool:
    """Tells whether training would take a GPU."""
    return torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Tells whether bfloat16 arithmetic is faster than float32 here: on a GPU, or on a CPU with AVX512-BF16 or AMX."""
    if has_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def register_machine_resolvers() -> None:
    """Makes ${cpu_or_gpu:a,b} and ${fast_precision:} known to configs: a where there is no GPU, else b; a trainer.precision."""
    OmegaConf.register_new_resolver("cpu_or_gpu", lambda cpu, gpu: gpu if has_gpu() else cpu, replace=True)
    OmegaConf.register_new_resolver("fast_precision", lambda: "bf16-mixed" if has_bfloat16() else "32-true", replace=True)


def describe_machine() -> str:
    """Returns the device in words."""
    if has_gpu():
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads{' with bfloat16' if has_bfloat16() else ''}"


def matrix_speed(half: bool, seconds: float = 0.2) -> float:
    """Returns operations a second of matrix products in a small model's shape, measured for so long."""
    device, dtype = ("cuda" if has_gpu() else "cpu"), torch.bfloat16 if half else torch.float32
    left, right = torch.randn(1024, 576, device=device, dtype=dtype), torch.randn(576, 1536, device=device, dtype=dtype)
    result = left @ right  # the first call prepares
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(4):
            result = left @ right
        count += 4
    if device == "cuda":
        float(result[0, 0])  # waits for what was launched
    return 2 * left.shape[0] * right.numel() * count / (time.perf_counter() - began)
