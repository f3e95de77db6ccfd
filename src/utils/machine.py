"""The machine: what configs choose by it, and its speed."""

import time

import torch
from omegaconf import OmegaConf


def has_gpu() -> bool:
    """Returns whether training would use a GPU."""
    return torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Returns whether bfloat16 is faster than float32: on a GPU that has it, or a CPU with AVX512-BF16 or AMX."""
    if has_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def register_machine_resolvers() -> None:
    """Registers ${cpu_or_gpu:a,b} (a without a GPU, else b) and ${fast_precision:} (a value of trainer.precision) for configs."""
    OmegaConf.register_new_resolver("cpu_or_gpu", lambda cpu, gpu: gpu if has_gpu() else cpu, replace=True)
    OmegaConf.register_new_resolver("fast_precision", lambda: "bf16-mixed" if has_bfloat16() else "32-true", replace=True)


def describe_machine() -> str:
    """Returns the device in words."""
    if has_gpu():
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads{' with bfloat16' if has_bfloat16() else ''}"


def matrix_speed(half: bool, seconds: float = 0.2) -> float:
    """Returns operations per second of matrix products in a small model's shape, in bfloat16 or float32.

    Args:
        half: bfloat16.
        seconds: how long to measure.
    """
    device, dtype = ("cuda" if has_gpu() else "cpu"), torch.bfloat16 if half else torch.float32
    left, right = torch.randn(1024, 576, device=device, dtype=dtype), torch.randn(576, 1536, device=device, dtype=dtype)
    result = left @ right  # warm-up
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            result = left @ right
        count += 4
    float(result[0, 0])  # waits for a GPU's queue
    return 2 * left.shape[0] * right.numel() * count / (time.perf_counter() - start)
