"""What the tests of the benchmarks share: a machine without clocks or peaks of its own."""

import pytest
import torch

from trisparse.bench.runner import Machine


class CountedTimer:
    """Takes its seconds from a list, and calls what it times."""

    warm_up = 1

    def __init__(self, seconds):
        self.seconds = iter(seconds)

    def __call__(self, call):
        call()
        return next(self.seconds)


class FixedPeaks:
    source = "given"

    def __init__(self, bytes_per_s, flops_per_s):
        self.given = (bytes_per_s, flops_per_s)

    def bytes_per_s(self):
        return self.given[0]

    def flops_per_s(self, dtype):
        return self.given[1].get(dtype)


@pytest.fixture
def machine():
    """``machine(seconds)``: a CPU whose calls take these seconds; 100 bytes/s, 1000 fp32 FLOP/s, commit abcdef0123."""

    def make(seconds=(1.0,) * 1000, *, dirty=False):
        environment = {"commit": "abcdef0123", "dirty": dirty, "cpu": {"model": "given"}}
        peaks = FixedPeaks(100.0, {"float32": 1000.0})
        return Machine(torch.device("cpu"), "cpu", CountedTimer(seconds), peaks, environment)

    return make
