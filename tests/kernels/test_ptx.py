"""The compiled kernels under emulation of their PTX: exact, free of races, and within the counted bounds.

The same figures, for more outputs, go to bench/results by `python -m trisparse.bench.bounds selection`.
"""

import os

import pytest
import torch

from trisparse.bench.bounds.selection import bound, cases
from trisparse.kernels import bitmask
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.nm import meta_2_4, select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)
try:
    ptxsim()
except ImportError:
    pytest.skip("needs ptxsim", allow_module_level=True)
pytestmark = pytest.mark.ptx


def checked():
    """The emulator with every check on."""
    return Emulator(options={"race_check": True, "check_uninit": True})


def normal(rows, cols, dtype=torch.bfloat16):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)


def vector(cols):
    return torch.rand(cols, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("ties", [True, False])
def test_rows_of_4096(dtype, ties):
    weight = normal(3, 4096, dtype)
    weight = (weight * 4).round() if ties else weight
    x = None if ties else vector(4096)
    zeroed = weight.clone()
    with using(checked()):
        packed = select_rows(zeroed, 2048, x=x, out="packed", apply=True)
        mask = select_rows(weight, 2048, x=x)
    expected = select_rows_ref(weight, 2048, x=x)
    assert torch.equal(mask, expected)
    assert torch.equal(packed, bitmask.pack_bits_ref(expected))
    assert torch.equal(zeroed, weight.masked_fill(~expected, 0))


def test_odd_rows(awkward):
    for name, weight in awkward(2, 65, torch.bfloat16).items():
        for x in (None, vector(65) - 0.5):
            with using(checked()):
                mask = select_rows(weight, 20, x=x)
            assert torch.equal(mask, select_rows_ref(weight, 20, x=x)), name


def test_rows_too_wide_for_registers():
    weight = normal(1, 40_001)
    with using(checked()):
        assert torch.equal(select_rows(weight, 15_000), select_rows_ref(weight, 15_000))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (3, 7)])
def test_nm_of_4096(n, m):
    cols = 4096 // m * m
    weight, x = normal(5, cols), vector(cols)
    zeroed = weight.clone()
    with using(checked()):
        packed = select_nm(zeroed, n, m, x=x, out="packed", apply=True)
    expected = select_nm_ref(weight, n, m, x=x)
    assert torch.equal(packed, bitmask.pack_bits_ref(expected))
    assert torch.equal(zeroed, weight.masked_fill(~expected, 0))


@pytest.mark.parametrize("sign", [1, -1])
def test_nm_with_ties(sign):
    weight = (normal(5, 4096) * 4).round()
    weight[:, ::64] = -0.0
    x = sign * (vector(4096) * 2).round()  # a negative x gives -0 and scores whose bits order backwards
    for n, m in ((2, 4), (8, 16)):
        with using(checked()):
            packed = select_nm(weight, n, m, x=x, out="packed")
        assert torch.equal(packed, bitmask.pack_bits_ref(select_nm_ref(weight, n, m, x=x))), (n, m)


def test_nm_nan_in_one_row():
    weight = normal(6, 4096)
    weight[5, 4095] = float("nan")
    for n, m in ((2, 4), (8, 16)):
        for x in (None, vector(4096)):
            with using(checked()), pytest.raises(ValueError, match="NaN"):
                select_nm(weight, n, m, x=x)


def test_nm_along_out_and_compressed():
    weight = normal(8, 4096)
    with using(checked()):
        mask = select_nm(weight, 2, 4, along_out=True)
        values, meta = select_nm(weight, 2, 4, out="compressed")
    assert torch.equal(mask, select_nm_ref(weight.T.contiguous(), 2, 4).T)
    expected = select_nm_ref(weight, 2, 4)
    assert torch.equal(values, weight[expected].reshape(8, 2048))
    assert torch.equal(meta, meta_2_4(expected))


@pytest.mark.parametrize("ties", [True, False])
def test_global(ties):
    weights = [normal(3, 4096, torch.float32), normal(5, 4096), normal(2, 4100)[:, 3:]]
    if ties:
        weights = [(weight * 4).round() for weight in weights]
    xs = [None, vector(4096), None]
    expected = select_global_ref(weights, 10_000, xs=xs)
    zeroed = [weight.clone() for weight in weights]
    with using(checked()):
        packed = select_global(zeroed, 10_000, xs=xs, out="packed", apply=True)
        masks = select_global(weights, 10_000, xs=xs)
    assert all(map(torch.equal, masks, expected))
    assert all(map(torch.equal, packed, map(bitmask.pack_bits_ref, expected)))
    for part, weight, mask in zip(zeroed, weights, expected, strict=True):
        assert torch.equal(part, weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("score", ["fp32", "bf16", "x", "all equal", "absolute False"])
def test_global_reads_twice(score):
    """Large enough to sample; in each case a part of the scores equal to the k-th is cut off."""
    weight = normal(66, 4096, torch.float32 if score == "fp32" else torch.bfloat16)
    weight = torch.ones_like(weight) if score == "all equal" else weight
    weight[40] = weight[20]
    xs = [vector(4096)] if score == "x" else None
    absolute = score != "absolute False"
    kth = weight.float() * (1 if xs is None else xs[0])
    kth = kth.abs() if absolute else kth
    k = int((kth > kth[20, 4]).sum()) + 1
    expected = select_global_ref([weight], k, xs=xs, absolute=absolute)
    with using(Emulator()) as emulator:
        masks = select_global([weight], k, xs=xs, absolute=absolute)
    assert torch.equal(masks[0], expected[0])
    assert [kernel for kernel, _ in emulator.profiles] == ["bracket_kernel", "write_kernel"]


def test_packed():
    weight, mask = normal(3, 4096), normal(3, 4096) > 0.5
    with using(checked()):
        packed = bitmask.pack_bits(mask)
        assert torch.equal(packed, bitmask.pack_bits_ref(mask))
        assert torch.equal(bitmask.unpack_bits(packed, 4096), mask)
        assert torch.equal(bitmask.count_bits(packed), mask.sum(1))
        values, offsets = bitmask.compress_bits(weight, packed)
        zeroed = bitmask.apply_bits(weight.clone(), packed)
        dense = bitmask.decompress_bits(values, packed, offsets, 4096)
    assert torch.equal(values, weight[mask])
    assert torch.equal(zeroed, weight.masked_fill(~mask, 0))
    assert torch.equal(dense, zeroed)


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)])
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("rows 50%, |W|*X, in place + packed", 1.0),
        ("rows 50%, |W|*X, packed", 1.5),
        ("rows 50%, |W|*X, mask", 1.0),
        ("rows 50%, |W| (ties), in place + packed", 1.0),
        ("layer 50%, |W|, in place + packed", 1.0),
        ("layer 50%, |W|*X, in place + packed", 1.1),
        ("2:4, |W|*X, in place + packed", 0.5),
        ("2:4, |W|*X, packed", 0.6),
        ("2:4, |W|*X, compressed", 0.7),
        ("4:8, |W|*X, in place + packed", 0.5),
        ("4:8, |W|*X, packed", 0.65),
        ("8:16, |W|*X, in place + packed", 0.5),
        ("8:16, |W|*X, packed", 0.7),
        ("16:32, |W|*X, in place + packed", 0.6),
        ("16:32, |W|*X, packed", 0.8),
    ],
)
def test_bounds_counted_from_ptx(name, limit, shape):
    figures = bound(cases()[name], *shape)
    assert figures["issue_over_dram"] <= limit
    # Global selection must read twice: (2 * 2 + 2.125) / (2 + 2.125) = 1.485 of the compulsory bytes.
    assert figures["dram_over_compulsory"] <= (1.52 if name.startswith("layer") else 1.05)
    assert figures["local_bytes"] == figures["spill_bytes"] == 0
    assert figures["conflicts"] <= 0.1
