"""Figures of times, peaks and clocks, by hand."""

from __future__ import annotations

import pytest
import torch

from trisparse.bench.clocks import clocks, parse_clocks
from trisparse.bench.peaks import CpuPeaks, GpuPeaks, peaks_of, roofline_share
from trisparse.bench.timing import CpuTimer, interleave, speedup, summary, timer_for


class Clock:
    """Moves by what it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def move(self, seconds):
        self.now += seconds


def test_interleave_times_each_call_alone():
    clock = Clock()
    steps = iter([9.0, 9.0, 1.0, 10.0, 2.0, 20.0])
    move = lambda: clock.move(next(steps))  # noqa: E731
    assert interleave({"a": move, "b": move}, 2, CpuTimer(clock)) == {"a": [1.0, 2.0], "b": [10.0, 20.0]}


@pytest.mark.parametrize(
    ("seconds", "least", "median", "p90"),
    [([3.0], 3, 3, 3), ([2.0, 1.0], 1, 1.5, 1.9), ([float(i) for i in range(11)], 0, 5, 9)],
)
def test_summary(seconds, least, median, p90):
    found = summary(seconds)
    assert (found["min"], found["median"], found["repeats"]) == (least, median, len(seconds))
    assert found["p90"] == pytest.approx(p90)


def test_speedup_is_the_median_of_the_rounds_and_not_the_ratio_of_medians():
    assert speedup([1.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == 3.0  # the medians give 4
    with pytest.raises(ValueError, match="zip"):
        speedup([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "bytes_per_s", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 2039e9, 312e12),
        ("NVIDIA A100-SXM4-40GB", 1555e9, 312e12),
        ("NVIDIA L4", 300e9, 121e12),
        ("NVIDIA H200", 4800e9, 989.5e12),
        ("NVIDIA GeForce RTX 4090", 1008e9, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None, None),
    ],
)
def test_datasheets(name, bytes_per_s, bf16):
    peaks = GpuPeaks(name)
    assert peaks.bytes_per_s() == bytes_per_s
    assert peaks.flops_per_s("bfloat16") == bf16
    assert peaks.flops_per_s("int4") is None


def test_a_cpu_is_measured_once():
    clock = Clock()
    peaks = CpuPeaks(lambda: (clock.move(0.5), clock.now)[1])  # every call takes half a second
    assert peaks.bytes_per_s() == 2 * 2**28 / 0.5
    assert peaks.flops_per_s("float32") == 2 * 1536**3 / 0.5
    before = clock.now
    peaks.bytes_per_s(), peaks.flops_per_s("float32")
    assert clock.now == before
    assert peaks.flops_per_s("int8") is None
    assert peaks.flops_per_s("no such dtype") is None


def test_roofline_share():
    peaks = GpuPeaks("NVIDIA A100-SXM4-80GB")  # 2039 GB/s, 312 TFLOP/s in bf16
    moved, done = 2_039_000_000, 312_000_000_000  # 1 ms each
    assert roofline_share(peaks, 2e-3, bytes=moved, flops=done // 2, dtype="bfloat16") == pytest.approx(0.5)
    assert roofline_share(peaks, 4e-3, bytes=moved // 2, flops=done, dtype="bfloat16") == pytest.approx(0.25)
    assert roofline_share(peaks, 2e-3, bytes=moved, flops=None, dtype="no such dtype") == pytest.approx(0.5)
    assert roofline_share(peaks, 2e-3, bytes=moved, flops=done, dtype="no such dtype") is None
    assert roofline_share(peaks, 2e-3, bytes=None, flops=None, dtype="bfloat16") is None
    assert roofline_share(GpuPeaks("unknown"), 1.0, bytes=1, flops=1, dtype="bfloat16") is None


def test_clocks():
    cpu = torch.device("cpu")
    assert clocks(cpu) is None
    assert isinstance(peaks_of(cpu), CpuPeaks)
    line = "1410, 1593, 1410, 0x0000000000000004, 41, 62.41\n"
    found = parse_clocks(line)
    assert (found["sm_mhz"], found["throttle_reasons"]) == ("1410", "0x0000000000000004")
    with pytest.raises(ValueError, match="zip"):
        parse_clocks("1410")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_the_call_on_the_device():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    timer = timer_for(device)
    found = interleave({"one": lambda: a @ a, "four": lambda: [a @ a for _ in range(4)]}, 5, timer)
    assert 3 < speedup(found["four"], found["one"]) < 5
    assert clocks(device) is not None
