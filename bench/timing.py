"""Seconds of functions that do the same, called in turn so that drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
_FLUSH_FACTOR = 2  # twice the L2 cache leaves nothing of the call before, whatever the cache's replacement rule


class Timer(Protocol):
    """Seconds of one call."""

    warm_up: int

    def __call__(self, call: Call) -> float: ...


class CpuTimer:
    """Wall time. The caches are left as the call before left them.

    Args:
        clock: seconds; tests bring their own.
    """

    warm_up = 1

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call) -> float:
        start = self.clock()
        call()
        return self.clock() - start


class CudaTimer:
    """The device's time between two events around the call, with the L2 cache flushed before it.

    The flush also gives the CPU time to enqueue the call, so that short kernels are not hidden by launches.

    Args:
        device: a CUDA device.
    """

    warm_up = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._larger_than_l2 = torch.empty(_FLUSH_FACTOR * cache, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._larger_than_l2.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer of a device.

    Raises:
        ValueError: it is neither the CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return CpuTimer()
    if device.type == "cuda":
        return CudaTimer(device)
    raise ValueError(f"device must be cpu or cuda, got {device}")


def interleave(contestants: Mapping[str, Call], repeats: int, timer: Timer) -> dict[str, list[float]]:
    """Seconds of each contestant's ``repeats`` calls, A B A B, after the timer's warm-up rounds in the same order.

    Args:
        contestants: name to function.
        repeats: rounds that count.
        timer: of the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-timer.warm_up, repeats):
        for name, call in contestants.items():
            taken = timer(call)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """``min``, ``median``, ``p90`` (interpolated between the two nearest) and the number of ``repeats``."""
    ordered = sorted(seconds)
    place = 0.9 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p90": ordered[low] + (place - low) * (ordered[high] - ordered[low]),
        "repeats": float(len(ordered)),
    }


def speedup(baseline: Sequence[float], contestant: Sequence[float]) -> float:
    """Median over the rounds of the baseline's seconds over the contestant's in the same round."""
    return statistics.median(usual / own for usual, own in zip(baseline, contestant, strict=True))
