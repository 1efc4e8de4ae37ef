"""What the device does well: answers that agree with the machine, and none that touch CUDA unasked."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trisparse.sparsity import hardware

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, **capabilities: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, True),
        ({"avx2": True, "amx_bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool) -> None:
    pretend(monkeypatch, **capabilities)
    assert hardware.bf16_is_fast(CPU) is fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.bf16_is_fast(torch.device("cuda", 0)) is fast


def test_bf16_elsewhere_is_not_claimed() -> None:
    assert not hardware.bf16_is_fast(torch.device("meta"))


def test_features_keep_their_order_and_leave_out_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, amx_bf16=True, avx2=True, avx512_f=False, sse2=True)
    assert hardware.cpu_features() == ["avx2", "amx_bf16"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_features_agree_with_the_kernel() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    found = hardware.cpu_features()
    for name, flag in {"avx2": "avx2", "avx512_f": "avx512f", "avx512_bf16": "avx512_bf16"}.items():
        assert (name in found) == (flag in flags), name


def test_memory_is_left_alone_off_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: pytest.fail("called the C library"))
    assert hardware.keep_freed_memory() is False


@pytest.mark.parametrize(("answers", "applied"), [([1, 1], True), ([0, 1], False), ([1, 0], False)])
def test_both_thresholds_are_set(monkeypatch: pytest.MonkeyPatch, answers: list[int], applied: bool) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        calls.append((parameter, value))
        return answers[len(calls) - 1]

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert hardware.keep_freed_memory() is applied
    assert calls == [(-3, 2**30), (-1, 2**31 - 1)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    """Page faults of ten 64 MB tensors, each freed before the next. In a process of its own: it lasts."""
    code = (
        "import resource, torch\n"
        "from trisparse.sparsity.hardware import keep_freed_memory\n"
        "applied = keep_freed_memory()\n"
        "def fill(): torch.empty(2**24).fill_(1.0)\n"
        "for _ in range(20): fill()\n"  # the first holes are too small for the next aligned request
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): fill()\n"
        "print(int(applied), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    applied, faults = map(int, run.stdout.split())
    once = 2**26 // resource.getpagesize()
    if applied:
        assert faults < once  # ten times as many without the setting
    else:
        assert faults > 0


def test_import_asks_nothing_of_cuda() -> None:
    code = (
        "import torch\n"
        "def refuse(*args): raise AssertionError('CUDA was queried')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import trisparse.sparsity.hardware\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
