"""The compile gate: every kernel, for sm_80 and sm_90, at the shapes of Llama-2 and OPT, fits its GPU."""

import os

import pytest
import torch

from trisparse.kernels import bitmask
from trisparse.kernels.aot import Resources, resources, table
from trisparse.kernels.nm import select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (5120, 13824), (8192, 28672)]


def operations(rows, cols, dtype):
    """Every operation on meta tensors, by name; the True ones must load 16 bytes a thread."""
    w = torch.empty(rows, cols, dtype=dtype, device="meta")
    x = torch.empty(cols, device="meta")
    mask = torch.empty(rows, cols, dtype=torch.bool, device="meta")
    packed = torch.empty(rows, cols // 8, dtype=torch.uint8, device="meta")
    return {
        "rows": (lambda: select_rows(w, cols // 2, x=x, out="packed", apply=True), True),
        "rows, no x": (lambda: select_rows(w, cols // 2), True),
        "2:4": (lambda: select_nm(w, 2, 4, x=x, out="packed", apply=True), True),
        "2:4 compressed": (lambda: select_nm(w, 2, 4, x=x, out="compressed"), True),
        "4:8": (lambda: select_nm(w, 4, 8, x=x, out="packed", apply=True), True),
        "8:16": (lambda: select_nm(w, 8, 16, x=x, out="packed", apply=True), True),
        "along out": (lambda: select_nm(w, 2, 4, x=x, along_out=True), False),
        "global": (lambda: select_global([w], 1, apply=True), True),
        "global, x": (lambda: select_global([w], 1, xs=[x]), True),
        "pack": (lambda: bitmask.pack_bits(mask), False),
        "unpack": (lambda: bitmask.unpack_bits(packed, cols), False),
        "count": (lambda: bitmask.count_bits(packed), False),
        "apply": (lambda: bitmask.apply_bits(w, packed), True),
        "compress": (lambda: bitmask.compress_bits(w, packed), False),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_gate(shape, dtype):
    for name, (operation, vectorised) in operations(*shape, dtype).items():
        rows = resources(operation)
        assert {row.cc for row in rows} == {80, 90}, name
        for row in rows:
            assert not row.problems(), (name, row)
        if vectorised:
            assert all(row.load_bytes == 16 for row in rows), (name, table(rows))


@pytest.mark.parametrize("cc", [89, 100])
def test_other_architectures_compile(cc):
    for name, (operation, _) in operations(4096, 4096, torch.bfloat16).items():
        assert all(not row.problems() for row in resources(operation, [cc])), name


def test_what_is_over_budget_is_named():
    spilling = Resources("kernel", 80, 4, 255, 8, 0, 16)
    assert spilling.problems() == ["kernel for sm_80 spills 8 bytes a thread"]
    large = Resources("kernel", 89, 4, 32, 0, 120_000, 16)
    assert "over 101376" in large.problems()[0]
    assert "OVER BUDGET" in table([spilling, large])
