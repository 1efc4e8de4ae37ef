"""The compile gate: every kernel, for sm_80 and sm_90, at the shapes of Llama-2 and OPT, fits its GPU."""

import os

import pytest
import torch

from trisparse.bench.compile_gate import SHAPES, operations
from trisparse.kernels.aot import Resources, resources, table

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)


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
