"""What the device at hand does well, and one setting of the C library that saves a fifth of a CPU forward."""

from __future__ import annotations

import ctypes
import platform

import torch

CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "bf16", "sve_bf16")
"""Instruction sets that decide how fast pruning runs, by the names of ``torch.cpu.get_capabilities``."""

# glibc, malloc.h. The values are a part of its ABI.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def cpu_features() -> list[str]:
    """Those of :data:`CPU_FEATURES` that this CPU (and its operating system) has, in that order."""
    has = torch.cpu.get_capabilities()
    return [name for name in CPU_FEATURES if has.get(name, False)]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on ``device``.

    CUDA: compute capability 8.0 (Ampere) or later, whose tensor cores take bf16. CPU: AVX512-BF16, AMX-BF16
    or Arm's bf16 extension; without them torch emulates bf16, slower than fp32. Other devices: False.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return any(name in ("avx512_bf16", "amx_bf16", "bf16") for name in cpu_features())
    return False


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees instead of mapping it anew each time (glibc only).

    glibc maps every tensor above 32 MB anew and unmaps it when it is freed, so each forward takes a page
    fault, and has the kernel zero a page, for every 4 kB of its activations: about 20% of the time of a
    CPU forward. With both thresholds high the heap reuses those pages. The price is that freed memory
    returns to the system only at exit, so a program calls this (the command line does), not a library.

    Returns:
        True when both thresholds were taken. False off glibc, and on an old glibc that caps the first.
    """
    # Not `and`: the second setting helps without the first.
    return all([_set_malloc(_M_MMAP_THRESHOLD, 2**30), _set_malloc(_M_TRIM_THRESHOLD, 2**31 - 1)])


def free_memory_at_once() -> bool:
    """Let this process give every larger tensor's memory back when it is freed, the contrary of keep_freed_memory.

    For a process that must stay small: holes in the heap between tensors of many sizes would add to its peak. Tensors
    up to 8 MB, most activations of a small model, still come from the heap.

    Returns:
        True when both thresholds were taken. False off glibc.
    """
    return all([_set_malloc(_M_MMAP_THRESHOLD, 2**23), _set_malloc(_M_TRIM_THRESHOLD, 2**23)])


def _set_malloc(parameter: int, value: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    return bool(mallopt(parameter, value) == 1)  # mallopt returns 1 where it took the value


def return_freed_memory() -> None:
    """Give the memory that was freed, and lies between what is in use, back to the system now (glibc only)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
