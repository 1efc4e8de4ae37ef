"""The compiled kernels of the compressed linear layer: under emulation of their PTX, and within their GPU's limits.

The bounds for more cases go to bench/results by `python -m trisparse.bench.bounds_linear`.
"""

import os

import pytest
import torch

from trisparse.bench.bounds_linear import bound, half
from trisparse.bench.linear_gate import operations
from trisparse.kernels.aot import resources
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.linear import linear, linear_backward, linear_ref

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)
try:
    ptxsim()
except ImportError:
    pytest.skip("needs ptxsim", allow_module_level=True)
pytestmark = pytest.mark.ptx
ALL = [("2:4", 2, 4), ("n:m", 4, 8), ("bitmask", 0, 0), ("masked", 0, 0)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def distance(a, b):
    return (a.double() - b).abs().max()


@pytest.mark.parametrize(("format", "n", "m"), ALL)
@pytest.mark.parametrize("tokens", [5, 40])
def test_races_and_values(format, n, m, tokens):
    weight = half(format, n, m, 136, 544)
    dense, a, b = weight.decompress(), normal(16, 544, seed=1) / 8, normal(136, 16, seed=2) / 8
    x, dy, bias = normal(tokens, 544, seed=3), normal(tokens, 136, seed=4), normal(136, seed=5)
    lora = (a, b, 0.5)
    with using(Emulator(options={"race_check": True, "check_uninit": True})):
        y = linear(x, weight, bias, lora)
        dx, low = linear_backward(dy, weight, lora)
    exact = x.double() @ dense.double().T + bias.double() + 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert distance(y, exact) <= 2 * distance(linear_ref(x, weight, bias, lora), exact)
    exact = dy.double() @ dense.double() + 0.5 * (dy.double() @ b.double()) @ a.double()
    assert distance(dx, exact) <= 2 * distance(dy @ dense + 0.5 * (dy @ b) @ a, exact)
    exact = dy.double() @ b.double()
    assert distance(low, exact) <= 2 * distance(dy @ b, exact)


@pytest.mark.parametrize(("format", "n", "m"), ALL[:3])
@pytest.mark.parametrize("tokens", [1, 16])
def test_bounds_with_few_tokens(format, n, m, tokens):
    weight = half(format, n, m, 4096, 4096)
    plain, adapted = bound(weight, tokens), bound(weight, tokens, rank=16)
    assert plain["bytes_over_compulsory"] <= 1.10
    assert plain["of_dense"] <= 0.62
    assert adapted["moved_bytes"] <= 1.05 * plain["moved_bytes"]
    assert plain["spill_bytes"] == adapted["spill_bytes"] == 0


@pytest.mark.parametrize("tokens", [16, 2048])
def test_gate(tokens):
    for name, operation in operations(4096, 4096, torch.bfloat16, (tokens,)):
        rows = resources(operation)
        assert {row.cc for row in rows} == {80, 90}, name
        assert not [problem for row in rows for problem in row.problems()], name
