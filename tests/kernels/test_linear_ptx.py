"""The compiled kernels of the compressed linear layer, under emulation of their PTX.

The bounds for more cases go to bench/results by `python -m trisparse.bench.bounds linear`.
"""

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch

from trisparse.bench.bounds.linear import SHAPES, TOKENS, bound, half
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
@pytest.mark.parametrize(("tokens", "rank"), [(5, 16), (5, 40), (40, 7)])
def test_races_and_values(format, n, m, tokens, rank):
    weight = half(format, n, m, 136, 544)
    dense, a, b = weight.decompress(), normal(rank, 544, seed=1) / 8, normal(136, rank, seed=2) / 8
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
def test_bounds_with_few_tokens(format, n, m):
    weight = half(format, n, m, 4096, 4096)
    for tokens in (1, 16):
        plain = bound(weight, tokens, ctas=8)
        assert plain["bytes_over_compulsory"] <= 1.10
        assert plain["of_dense"] <= 0.62
        assert plain["binding"] == "DRAM"
        assert plain["spill_bytes"] == 0


RECORDED = Path(__file__).parents[2] / "bench/results/linear-bounds-a100.json"


def case(row):
    return tuple(row[key] for key in ("format", "rows", "cols", "tokens", "rank"))


def test_recorded_bounds():
    recorded = {case(row): row for row in json.loads(RECORDED.read_text())["results"]}
    assert set(recorded) == {
        (format, *shape, tokens, rank)
        for (format, _, _), shape, tokens, rank in product(ALL[:3], SHAPES, TOKENS, (0, 16))
    }
    for (*key, rank), row in recorded.items():
        plain = recorded[(*key, 0)]
        assert row["bytes_over_compulsory"] <= 1.10, row
        assert row["of_dense"] <= 0.62, row
        assert row["moved_bytes"] <= (1.05 if rank else 1) * plain["moved_bytes"], row
        assert row["launches"] == plain["launches"], row  # an adapter adds none
        assert row["spill_bytes"] == 0, row


def test_recorded_bounds_are_those_of_the_kernels():
    recorded = {case(row): row for row in json.loads(RECORDED.read_text())["results"]}
    row = recorded["2:4", 4096, 4096, 1, 16]
    now = bound(half("2:4", 2, 4, 4096, 4096), 1, 16)
    for figure in ("compressed_bytes", "moved_bytes", "bound_us"):
        assert now[figure] == pytest.approx(row[figure], rel=0.01)
