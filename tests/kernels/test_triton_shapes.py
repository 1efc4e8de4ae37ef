"""The kernels at shapes that break indexing: one row, 257 rows, widths 1, 2^k - 1, 2^k + 1 and 11008, no elements.

Run as test_triton.py, which has the awkward values at a few shapes; here rows of all of them are mixed.
"""

import os

import pytest
import torch

from trisparse.kernels import bitmask
from trisparse.kernels.launch import device, interpret, using
from trisparse.kernels.nm import meta_2_4, select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
# The interpreter computes with NumPy, which warns of what the kernels mean: Inf - Inf while a bracket is
# open.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if INTERPRETED else [pytest.mark.gpu]
WHERE = "cpu" if INTERPRETED else "cuda"
WIDTHS = [1, 2, 31, 33, 127, 129, 11008]
EMPTY = [(0, 64), (3, 0), (0, 0)]


@pytest.fixture(autouse=True)
def runner():
    with using(interpret if INTERPRETED else device):
        yield


@pytest.fixture
def mixed(awkward, dtype):
    """Function (rows, cols) -> a weight in whose rows the awkward kinds take turns, 3 columns wider in memory."""

    def make(rows, cols):
        kinds = list(awkward(rows, cols, dtype).values())
        weight = torch.full((rows, cols + 3), torch.nan, dtype=dtype)[:, 2 : 2 + cols]
        for row in range(rows):
            weight[row] = kinds[row % len(kinds)][row]
        return weight.to(WHERE)

    return make


def vector(cols):
    return (torch.rand(cols, generator=torch.Generator().manual_seed(cols)) + 0.25).to(WHERE)


def strided_copy(weight):
    """A copy whose neighbours in memory are NaN, to see that nothing is written beside it."""
    around = torch.full((weight.shape[0], weight.shape[1] + 5), torch.nan, dtype=weight.dtype, device=weight.device)
    inside = around[:, 3 : 3 + weight.shape[1]]
    inside.copy_(weight)
    return around, inside


def check_zeroed(select, weight, expected, name=""):
    """``select(copy)`` zeroes a strided copy of ``weight`` but for what is ``expected``; gives its result."""
    around, inside = strided_copy(weight)
    result = select(inside)
    assert torch.equal(inside, weight.masked_fill(~expected, 0)), name
    assert around[:, :3].isnan().all(), name
    assert around[:, 3 + weight.shape[1] :].isnan().all(), name
    return result


def check_rows(weight, k, x=None):
    expected = select_rows_ref(weight, k, x=x)
    if weight.shape[0] < 257:  # else one launch is enough: a program takes the interpreter up to 40 ms
        assert torch.equal(select_rows(weight, k, x=x), expected)
    packed = check_zeroed(lambda w: select_rows(w, k, x=x, out="packed", apply=True), weight, expected)
    assert torch.equal(packed, bitmask.pack_bits_ref(expected))


@pytest.mark.parametrize("cols", WIDTHS)
def test_one_row(awkward, dtype, cols):
    kinds = awkward(1, cols, dtype)
    names = list(kinds)[WIDTHS.index(cols) % 3 :: 3] if cols < 1000 else ["special values"]
    for number, name in enumerate(names):
        check_rows(kinds[name].to(WHERE), (cols + 1) // 2, (None, vector(cols))[number % 2])


def test_257_rows(awkward):
    check_rows(awkward(257, 2, torch.bfloat16)["few values"].to(WHERE), 1)


@pytest.mark.parametrize("shape", EMPTY)
def test_no_rows_or_columns(mixed, shape):
    weight = mixed(*shape)
    k = shape[1] // 2
    check_rows(weight, k)
    check_rows(weight, k, vector(shape[1]))
    check_nm(weight, 2, 4, None)
    check_nm(weight, 2, 4, None, along_out=True) if shape[0] % 4 == 0 else None
    check_global([weight, weight[:0]], 0)
    check_bits(weight, torch.zeros(shape, dtype=torch.bool, device=WHERE))


def check_nm(weight, n, m, x, along_out=False):
    if along_out:
        score = weight.float().abs() if x is None else weight.float().abs() * x
        expected = select_nm_ref(score.T.contiguous(), n, m, absolute=False).T.contiguous()
    else:
        expected = select_nm_ref(weight, n, m, x=x)
    small = weight.numel() < 1000
    if small:
        assert torch.equal(select_nm(weight, n, m, x=x, along_out=along_out), expected)
    packed = check_zeroed(
        lambda w: select_nm(w, n, m, x=x, along_out=along_out, out="packed", apply=True), weight, expected
    )
    assert torch.equal(packed, bitmask.pack_bits_ref(expected))
    if not small or along_out or ((n, m) == (2, 4) and weight.shape[1] % 16):
        return
    values, meta = check_zeroed(lambda w: select_nm(w, n, m, x=x, out="compressed", apply=True), weight, expected)
    assert torch.equal(values, weight[expected].reshape(weight.shape[0], weight.shape[1] * n // m))
    assert torch.equal(meta, meta_2_4(expected) if (n, m) == (2, 4) else bitmask.pack_bits_ref(expected))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7), (16, 32)])
def test_nm(mixed, dtype, n, m):
    for rows, groups in ((1, 1), (1, 33), (3, 4)):
        check_nm(mixed(rows, groups * m), n, m, None if rows > 1 else vector(groups * m))
    if m != 7:
        check_nm(mixed(1, 11008), n, m, vector(11008))
    if dtype == {4: torch.float32, 7: torch.float16, 32: torch.bfloat16}[m]:  # each takes the interpreter seconds
        check_nm(mixed(257, m), n, m, None)


def test_nm_along_out(mixed):
    for rows, cols in ((4, 1), (8, 31), (12, 129), (4, 11008), (256, 3)):
        check_nm(mixed(rows, cols), 2, 4, vector(cols) if cols == 31 else None, along_out=True)


def check_global(weights, k, xs=None):
    expected = select_global_ref(weights, k, xs=xs)
    if all(weight.numel() < 1000 for weight in weights):
        assert all(map(torch.equal, select_global(weights, k, xs=xs), expected))
    copies = [strided_copy(weight) for weight in weights]
    packed = select_global([inside for _, inside in copies], k, xs=xs, out="packed", apply=True)
    for (around, inside), weight, mask, bits in zip(copies, weights, expected, packed, strict=True):
        assert torch.equal(inside, weight.masked_fill(~mask, 0))
        assert around[:, :3].isnan().all()
        assert torch.equal(bits, bitmask.pack_bits_ref(mask))


def test_global(mixed):
    check_global([mixed(1, 1)], 1)
    check_global([mixed(1, 1), mixed(1, 11008)], 5000)
    check_global([mixed(1, 257)], 100)
    check_global([mixed(3, 129), mixed(2, 31)], 200, [vector(129), None])


def test_global_of_257_strided_rows(awkward):
    weight = awkward(257, 2, torch.bfloat16)["strided rows"].to(WHERE)
    expected = select_global_ref([weight], 300, xs=[vector(2)])[0]
    assert torch.equal(select_global([weight], 300, xs=[vector(2)])[0], expected)


@pytest.mark.parametrize("kind", ["all equal", "all zero", "zeros of both signs", "special values", "subnormals"])
def test_global_with_ties(awkward, dtype, kind):
    weights = [awkward(3, 33, dtype)[kind].to(WHERE), awkward(1, 7, dtype)[kind].to(WHERE)]
    check_global(weights, 51)


def check_bits(weight, mask):
    packed = bitmask.pack_bits_ref(mask)
    assert torch.equal(bitmask.pack_bits(mask), packed)
    assert torch.equal(bitmask.unpack_bits(packed, mask.shape[1]), mask)
    assert torch.equal(bitmask.count_bits(packed), mask.sum(1))
    check_zeroed(lambda w: bitmask.apply_bits(w, packed), weight, mask)
    values, offsets = bitmask.compress_bits(weight, packed)
    expected_values, expected_offsets = bitmask.compress_bits_ref(weight, packed)
    assert torch.equal(values, expected_values)
    assert torch.equal(offsets, expected_offsets)
    dense = bitmask.decompress_bits(values, packed, offsets, mask.shape[1])
    assert torch.equal(dense, weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 127), (3, 129), (1, 11008)])
def test_bits(mixed, shape):
    weight = mixed(*shape)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(WHERE)
    check_bits(weight, mask)
    if shape[0] == 3:
        check_bits(weight, torch.zeros_like(mask))
        check_bits(weight, torch.ones_like(mask))


def test_bits_of_257_rows(awkward):
    weight = awkward(257, 2, torch.bfloat16)["special values"].to(WHERE)
    check_bits(weight, (weight > 0))
