"""The kernels against the references, through the public operations: interpreted, or on a device.

    TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py        (test_interpreter.py runs this)
    pytest -m gpu tests/kernels/test_triton.py

tests/kernels/test_ptx.py runs the compiled kernels under emulation.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
WIDTHS = [1, 7, 63, 64, 65] if INTERPRETED else [1, 7, 63, 64, 65, 257, 4096, 4097, 11008, 40000]
PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16), (1, 2), (3, 7), (31, 32)]


@pytest.fixture(autouse=True)
def runner():
    with using(interpret if INTERPRETED else device):
        yield


def vector(cols):
    return (torch.rand(cols, generator=torch.Generator().manual_seed(cols)) + 0.25).to(WHERE)


def cases(awkward, rows, cols, dtype):
    return {name: weight.to(WHERE) for name, weight in awkward(rows, cols, dtype).items()}


@pytest.mark.parametrize("cols", WIDTHS)
def test_rows(awkward, dtype, cols):
    for number, (name, weight) in enumerate(cases(awkward, 2, cols, dtype).items()):
        x = (None, vector(cols), -vector(cols))[number % 3]
        for absolute, k in {(True, 0), (True, 1), (False, cols // 2), (False, cols)}:
            expected = select_rows_ref(weight, k, x=x, absolute=absolute)
            mask = select_rows(weight, k, x=x, absolute=absolute)
            assert torch.equal(mask, expected), (name, k, absolute)
        zeroed = weight.clone()
        packed = select_rows(zeroed, cols // 2, x=x, out="packed", apply=True)
        kept = select_rows_ref(weight, cols // 2, x=x)
        assert torch.equal(packed, bitmask.pack_bits_ref(kept)), name
        assert torch.equal(zeroed, weight.masked_fill(~kept, 0)), name


def test_rows_of_llama(dtype):
    weight = torch.randn(1, 11008, generator=torch.Generator().manual_seed(0)).to(dtype).to(WHERE)
    assert torch.equal(select_rows(weight, 5504), select_rows_ref(weight, 5504))
    assert torch.equal(select_nm(weight, 2, 4), select_nm_ref(weight, 2, 4))


def test_rows_too_wide_for_registers(monkeypatch, awkward, dtype):
    from trisparse.kernels import select_triton

    monkeypatch.setattr(select_triton, "MAX_HELD", 4)
    for number, (name, weight) in enumerate(cases(awkward, 2, 65, dtype).items()):
        x = (None, vector(65))[number % 2]
        expected = select_rows_ref(weight, 20, x=x)
        assert torch.equal(select_rows(weight.clone(), 20, x=x, apply=True), expected), name


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm(awkward, dtype, n, m):
    groups = 1 if m > 8 else 9
    for number, (name, weight) in enumerate(cases(awkward, 2, groups * m, dtype).items()):
        x = (None, vector(groups * m), -vector(groups * m))[number % 3]
        expected = select_nm_ref(weight, n, m, x=x, absolute=number % 2 == 0)
        zeroed = weight.clone()
        mask = select_nm(zeroed, n, m, x=x, absolute=number % 2 == 0, apply=True)
        assert torch.equal(mask, expected), name
        assert torch.equal(zeroed, weight.masked_fill(~expected, 0)), name
        packed = select_nm(weight, n, m, x=x, absolute=number % 2 == 0, out="packed")
        assert torch.equal(packed, bitmask.pack_bits_ref(expected)), name


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7)])
def test_nm_along_out(awkward, dtype, n, m):
    for name, weight in cases(awkward, 2 * m, 11, dtype).items():
        for x in (None, vector(11)):
            score = weight.float().abs() if x is None else weight.float().abs() * x
            expected = select_nm_ref(score.T.contiguous(), n, m, absolute=False).T
            assert torch.equal(select_nm(weight, n, m, x=x, along_out=True), expected), name
            packed = select_nm(weight, n, m, x=x, along_out=True, out="packed")
            assert torch.equal(packed, bitmask.pack_bits_ref(expected.contiguous())), name


def test_nm_compressed(awkward, dtype):
    for name, weight in cases(awkward, 3, 48, dtype).items():
        mask = select_nm_ref(weight, 2, 4)
        values, meta = select_nm(weight, 2, 4, out="compressed")
        assert torch.equal(values, weight[mask].reshape(3, 24)), name
        assert torch.equal(meta, meta_2_4(mask)), name
        mask = select_nm_ref(weight, 3, 8)
        zeroed = weight.clone()
        values, packed = select_nm(zeroed, 3, 8, out="compressed", apply=True)
        assert torch.equal(values, weight[mask].reshape(3, 18)), name
        assert torch.equal(packed, bitmask.pack_bits_ref(mask)), name
        assert torch.equal(zeroed, weight.masked_fill(~mask, 0)), name


def test_global(awkward, dtype):
    x = vector(66)[::2]  # strided, as a view of several layers' statistics may be
    for number, (name, weight) in enumerate(cases(awkward, 7, 33, dtype).items()):
        other = cases(awkward, 3, 33, torch.float32)["few values"]
        weights = [weight, other, weight[:0], weight[:3].clone()]
        for xs, absolute, k in ((None, True, 150), ([x, None, x, x - 0.5], False, 200), (None, True, number % 2 * 429)):
            zeroed = [part.clone() for part in weights]
            expected = select_global_ref(weights, k, xs=xs, absolute=absolute)
            masks = select_global(zeroed, k, xs=xs, absolute=absolute, apply=True)
            assert all(map(torch.equal, masks, expected)), (name, k)
            for part, before, mask in zip(zeroed, weights, expected, strict=True):
                assert torch.equal(part, before.masked_fill(~mask, 0)), (name, k)


@pytest.mark.parametrize("cols", [33, 40, 1032])
def test_global_packed(awkward, dtype, cols):
    weights = [cases(awkward, 3, cols, dtype)[name] for name in ("normal", "few values", "every other row")]
    expected = select_global_ref(weights, 4 * cols)
    zeroed = [weight.clone() for weight in weights]
    packed = select_global(zeroed, 4 * cols, out="packed", apply=True)
    assert all(map(torch.equal, packed, map(bitmask.pack_bits_ref, expected)))
    for part, before, mask in zip(zeroed, weights, expected, strict=True):
        assert torch.equal(part, before.masked_fill(~mask, 0))


def adversarial():
    """Weights [40, 50] that are hard to sample, or to bracket."""
    normal = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    outliers = normal.clone()
    outliers[3, 5], outliers[7] = 1e38, math.inf
    return {
        "normal": normal,
        "bf16": normal.bfloat16(),
        "sorted": normal.flatten().sort().values.reshape(40, 50),
        "outliers": outliers,
        "all equal": torch.full((40, 50), 3.0),
        "two values": (normal > 0.3).float() + 1,
        "mostly zero": torch.where(normal > 1.5, normal, 0.0),
    }


@pytest.mark.parametrize("k", [1, 700, 1600, 2333])
@pytest.mark.parametrize("miss", ["small", "above", "below"])
def test_global_with_an_unlucky_sample(monkeypatch, k, miss):
    """Brackets from 16 samples, which hold too many scores inside or none at all; and such that always miss."""
    from trisparse.kernels import threshold_triton

    monkeypatch.setattr(threshold_triton, "_SAMPLES", 16)
    monkeypatch.setattr(threshold_triton, "_MARGIN", 1)
    if miss != "small":
        end = (torch.tensor([2.5 if miss == "above" else 0.001], device=WHERE),) * 2
        monkeypatch.setattr(threshold_triton, "_bracket", lambda *_, **__: end)
    for name, weight in adversarial().items():
        weights = [weight.to(WHERE), vector(333)[None]]
        expected = select_global_ref(weights, k)
        assert all(map(torch.equal, select_global(weights, k), expected)), name


@pytest.mark.parametrize("cols", [1, 8, 9, 70, 1025])
def test_packed(dtype, cols):
    generator = torch.Generator().manual_seed(cols)
    mask = (torch.rand(4, cols + 3, generator=generator) < 0.4).to(WHERE)[:, 2 : 2 + cols]
    packed = bitmask.pack_bits(mask)
    assert torch.equal(packed, bitmask.pack_bits_ref(mask))
    assert torch.equal(bitmask.unpack_bits(packed, cols), mask)
    assert torch.equal(bitmask.count_bits(packed), mask.sum(1))
    weight = torch.randn(4, cols + 1, generator=generator).to(dtype).to(WHERE)[:, :cols]
    values, offsets = bitmask.compress_bits(weight, packed)
    expected_values, expected_offsets = bitmask.compress_bits_ref(weight, packed)
    assert torch.equal(values, expected_values)
    assert torch.equal(offsets, expected_offsets)
    zeroed = bitmask.apply_bits(weight.clone(), packed)
    assert torch.equal(zeroed, bitmask.apply_bits_ref(weight, packed))
    assert torch.equal(bitmask.decompress_bits(values, packed, offsets, cols), zeroed)


def test_nan_raises(dtype):
    for cols in (4, 64):
        weight = torch.ones(3, cols, dtype=dtype, device=WHERE)
        weight[2, cols - 1] = math.nan
        for k in (0, 1, cols):
            with pytest.raises(ValueError, match="weight gives NaN"):
                select_rows(weight, k)
        with pytest.raises(ValueError, match="weight gives NaN"):
            select_nm(weight, 2, 4)
        with pytest.raises(ValueError, match=r"weights\[1\] gives NaN"):
            select_global([weight[:1], weight], 1)
        weight[2, cols - 1] = math.inf
        zero = torch.zeros(cols, device=WHERE)
        with pytest.raises(ValueError, match="weight times x gives NaN"):
            select_rows(weight, 1, x=zero)
        with pytest.raises(ValueError, match="weight times x gives NaN"):
            select_nm(weight, 2, 4, x=zero)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_properties(data):
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0]) | st.floats(-1e3, 1e3, width=32)
    flat = data.draw(st.lists(values, min_size=rows * groups * 4, max_size=rows * groups * 4))
    weight = torch.tensor(flat).reshape(rows, groups * 4).to(WHERE)
    order = torch.randperm(rows).to(WHERE)
    k = data.draw(st.integers(0, groups * 4))
    for select, kept in ((lambda w: select_rows(w, k), k), (lambda w: select_nm(w, 2, 4), groups * 2)):
        mask = select(weight)
        assert (mask.sum(1) == kept).all()
        assert torch.equal(select(weight[order]), mask[order])
        assert torch.equal(select(weight * 8.0), mask)
    assert sum(int(part.sum()) for part in select_global([weight], k)) == k
