"""What a device can do at most, for the share of the roofline: bytes/s of its memory and FLOP/s in each dtype.

    time allowed = max(bytes / peak bytes/s, flops / peak FLOP/s)        share = time allowed / time measured

(Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures".)
A GPU's figures are its datasheet's. A CPU has none that hold for its memory, so they are measured once a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_COPY_BYTES = 1 << 28  # 256 MiB read and as much written: more than most caches hold
_GEMM = 1536
_PROBES = 5


@dataclass(frozen=True)
class Datasheet:
    """One GPU: GB/s of its memory, dense TFLOP/s by dtype (tensor cores for the 16-bit ones, none for float32)."""

    gb_per_s: float
    float32: float
    half: float
    tf32: float

    def tflop_per_s(self, dtype: str) -> float | None:
        """Dense TFLOP/s; None for a dtype that is not listed."""
        return {"float32": self.float32, "tf32": self.tf32, "bfloat16": self.half, "float16": self.half}.get(dtype)


# By how the device's name ends (a laptop's, or a MIG slice's, goes on). NVIDIA's datasheets, dense figures (half of
# what is printed "with sparsity"), bf16 and fp16 with fp32 accumulation.
DATASHEETS: tuple[tuple[str, Datasheet], ...] = (
    # NVIDIA A100 Tensor Core GPU datasheet (June 2021): SXM4 and PCIe at 40 and 80 GB
    ("A100-SXM4-80GB", Datasheet(2039, 19.5, 312, 156)),
    ("A100 80GB PCIe", Datasheet(1935, 19.5, 312, 156)),
    ("A100-SXM4-40GB", Datasheet(1555, 19.5, 312, 156)),
    ("A100-PCIE-40GB", Datasheet(1555, 19.5, 312, 156)),
    # NVIDIA H100 Tensor Core GPU datasheet: SXM5 names itself "H100 80GB HBM3"; PCIe from the H100 architecture paper
    ("H100 80GB HBM3", Datasheet(3350, 67, 989.5, 494.5)),
    ("H100 PCIe", Datasheet(2039, 51, 756, 378)),
    ("H100 NVL", Datasheet(3938, 60, 835.5, 417.5)),
    # NVIDIA H200 Tensor Core GPU datasheet (SXM)
    ("H200", Datasheet(4800, 67, 989.5, 494.5)),
    # NVIDIA L4 and L40S Tensor Core GPU datasheets
    ("L40S", Datasheet(864, 91.6, 362, 183)),
    ("L4", Datasheet(300, 30.3, 121, 60)),
    # NVIDIA A10 and A30 datasheets
    ("A10G", Datasheet(600, 31.2, 70, 35)),
    ("A10", Datasheet(600, 31.2, 125, 62.5)),
    ("A30", Datasheet(933, 10.3, 165, 82)),
    # NVIDIA Ada and Ampere GA102 GPU architecture papers, appendix A (fp32 accumulation)
    ("RTX 4090", Datasheet(1008, 82.6, 165.2, 82.6)),
    ("RTX 3090", Datasheet(936, 35.6, 71, 35.6)),
)


class Peaks(Protocol):
    """A device's peaks."""

    source: str

    def bytes_per_s(self) -> float | None: ...

    def flops_per_s(self, dtype: str) -> float | None: ...


class GpuPeaks:
    """Of the datasheet; None for a GPU that is not listed.

    Args:
        name: as torch gives it.
    """

    def __init__(self, name: str) -> None:
        self.sheet = next((sheet for end, sheet in DATASHEETS if f" {name}".endswith(f" {end}")), None)
        self.source = "datasheet" if self.sheet else "unknown"

    def bytes_per_s(self) -> float | None:
        return None if self.sheet is None else self.sheet.gb_per_s * 1e9

    def flops_per_s(self, dtype: str) -> float | None:
        peak = None if self.sheet is None else self.sheet.tflop_per_s(dtype)
        return None if peak is None else peak * 1e12


class CpuPeaks:
    """Measured when first asked for: a copy of 256 MiB (read and written), a product of 1536² matrices in the dtype.

    Args:
        clock: seconds; tests bring their own.
    """

    source = "measured"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._found: dict[str, float] = {}

    def bytes_per_s(self) -> float | None:
        if "bytes" not in self._found:
            source = torch.ones(_COPY_BYTES // 4)
            target = torch.empty_like(source)
            self._found["bytes"] = 2 * _COPY_BYTES / self._fastest(lambda: target.copy_(source))
        return self._found["bytes"]

    def flops_per_s(self, dtype: str) -> float | None:
        kind = getattr(torch, dtype, None)
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            return None
        if dtype not in self._found:
            a, b = (torch.ones(_GEMM, _GEMM, dtype=kind) for _ in range(2))
            self._found[dtype] = 2 * _GEMM**3 / self._fastest(lambda: a @ b)
        return self._found[dtype]

    def _fastest(self, call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(1 + _PROBES):  # the first touches the memory and is not the fastest
            start = self.clock()
            call()
            taken.append(self.clock() - start)
        return min(taken)


def peaks_of(device: torch.device) -> Peaks:
    """The peaks of a device."""
    return CpuPeaks() if device.type == "cpu" else GpuPeaks(torch.cuda.get_device_name(device))


def roofline_share(peaks: Peaks, seconds: float, *, bytes: int | None, flops: int | None, dtype: str) -> float | None:
    """The time that the peaks allow over ``seconds``; None where a peak that it takes is unknown, or there is no work.

    Args:
        peaks: of the device.
        seconds: measured.
        bytes: that must be moved, or None.
        flops: that must be done, or None.
        dtype: in which; names the peak.
    """
    allowed = 0.0
    for work, peak in ((bytes, peaks.bytes_per_s), (flops, lambda: peaks.flops_per_s(dtype))):
        if not work:
            continue
        most = peak()
        if most is None:
            return None
        allowed = max(allowed, work / most)
    return allowed / seconds if allowed else None
