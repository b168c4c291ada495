"""bfloat16 on this machine: whether its hardware computes in it, and what that brings."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

#: Flags of CPUs that multiply matrices of bf16, as Linux names them: x86, ARM.
CPU_FLAGS = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
#: Compute capability of the first GPUs with bf16.
GPU_SINCE = (8, 0)
#: Tokens, hidden size and FFN size of the measured product; seconds to measure for, and products at least.
SHAPE, SECONDS, LEAST = (512, 1024, 4096), 1.0, 3
#: Below this factor bf16 is not worth setting.
WORTH = 1.1
NONE = "no native bf16: fp32 is faster here"


def native_bf16(root: Path = Path("/")) -> bool:
    """Return whether the GPU, or without one the CPU, computes in bf16. root: where /proc is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability(0) >= GPU_SINCE
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not CPU_FLAGS.isdisjoint(found.partition(":")[2].split())


def bf16_speedup() -> float:
    """Measure a matrix product of a model's size; return the seconds in fp32 over those in bf16. Takes a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, hidden, ffn = SHAPE
    pairs = {
        dtype: (
            torch.ones(tokens, hidden, device=device, dtype=dtype),
            torch.ones(hidden, ffn, device=device, dtype=dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or len(times[torch.bfloat16]) <= LEAST:
        for dtype, (left, right) in pairs.items():  # side by side: both meet the same load
            times[dtype].append(_seconds(left, right))
    fp32, bf16 = (statistics.median(each[1:]) for each in times.values())  # the first of each warms up
    return fp32 / bf16


def bf16_sentence() -> str:
    """Return what `bf16: true` would bring on this machine, measured where the hardware has it."""
    if not native_bf16():
        return NONE
    factor = bf16_speedup()
    if factor < WORTH:
        return f"native here, but matrix products run only {factor:.1f}x as fast as fp32"
    return f"native here; matrix products run {factor:.1f}x as fast as fp32: set bf16: true"


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    left @ right
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
