"""What is zeroed in place must share no memory with the other arguments; interleaved slices share none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.kernels import bitmask
from trisparse.kernels.nm import select_nm
from trisparse.kernels.score import check_disjoint
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global, select_global_ref


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "slices",
    [
        lambda w: w.chunk(3, dim=1),
        lambda w: w.chunk(3),
        lambda w: [w[::2], w[1::2]],
        lambda w: [w[:, :64], w[2:, 100:]],
        lambda w: [w[:, :64], w[::2, 64:]],
        lambda w: [w[:2, :64], w[1:, 64:]],
        # Where the first would go on, in a fourth row, the second has a row; strides 192 and 320.
        lambda w: [w[:3, :64], w.as_strided((2, 8), (320, 1), 256)],
    ],
)
def test_slices_of_a_fused_weight_are_allowed(slices):
    parts = slices(normal(6, 192))
    before = [part.clone() for part in parts]
    k = sum(part.numel() for part in parts) // 2
    expected = select_global_ref(before, k)
    select_global(parts, k, apply=True)
    for part, was, mask in zip(parts, before, expected, strict=True):
        assert torch.equal(part, was.masked_fill(~mask, 0))


@pytest.mark.parametrize(
    "slices",
    [
        lambda w: [w, w],
        lambda w: [w[:, :33], w[:, 32:]],
        lambda w: [w[:3], w[2:]],
        lambda w: [w[:, :40], normal(2, 8), w[5:, 39:]],
        lambda w: [w.view(4, 96), w[5:, 10:20]],
        lambda w: [w.view(torch.float16)[:, :4], w[:, 1:3]],
    ],
)
def test_overlapping_weights(slices):
    weights = slices(normal(6, 64).round())
    last = len(weights) - 1
    select_global(weights, 5)
    before = [weight.clone() for weight in weights]
    with pytest.raises(ValueError, match=rf"weights\[{last}\] overlaps the memory of weights\[0\]"):
        select_global(weights, 5, apply=True)
    assert all(map(torch.equal, weights, before))


def test_overlapping_x():
    buffer = normal(8, 32).abs()
    weight, x = buffer[:7], buffer[7]
    rows = {
        "rows": lambda x: select_rows(weight, 3, x=x, apply=True),
        "nm": lambda x: select_nm(weight, 2, 4, x=x, apply=True),
        "compressed": lambda x: select_nm(weight, 2, 4, x=x, out="compressed", apply=True),
    }
    for select in rows.values():
        select(x)
        select(buffer[7, :1].expand(32))
        with pytest.raises(ValueError, match="x overlaps the memory of weight"):
            select(buffer[6])
        with pytest.raises(ValueError, match="x overlaps the memory of weight"):
            select(buffer[2, :1].expand(32))
    select_global([weight, normal(2, 32)], 9, xs=[x, x], apply=True)
    with pytest.raises(ValueError, match=r"xs\[1\] overlaps the memory of weights\[0\]"):
        select_global([weight, normal(2, 32)], 9, xs=[x, buffer[3]], apply=True)
    # A column between the columns of the weight: no byte in common.
    select_rows(buffer[:, :31], 3, x=buffer.view(-1)[31::32].repeat(4)[:31], apply=True)
    check_disjoint({"weight": buffer[:, :31]}, {"x": buffer[:, 31]})
    with pytest.raises(ValueError, match="x overlaps"):
        check_disjoint({"weight": buffer[:, :31]}, {"x": buffer[:, 30]})


def test_overlapping_bits():
    buffer = normal(4, 32)
    with pytest.raises(ValueError, match="packed overlaps the memory of weight"):
        bitmask.apply_bits(buffer, buffer.view(torch.uint8)[:, :4])


def test_the_first_argument_is_named_where_it_alone_is_written():
    """`read` may lie before or behind what is written, and two that are only read may overlap."""
    buffer = normal(40)
    check_disjoint({"weight": buffer[8:16].view(2, 4)}, {"x": buffer[:8], "y": buffer[4:8], "z": None})
    for read in (buffer[15:20], buffer[5:9], buffer):
        with pytest.raises(ValueError, match="x overlaps the memory of weight"):
            check_disjoint({"weight": buffer[8:16].view(2, 4)}, {"x": read})


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_exact_for_any_slices(data):
    """Against the sets of bytes."""
    buffer = torch.zeros(64, dtype=torch.uint8)

    def draw():
        dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float32]))
        typed = buffer.view(dtype)
        rows, cols = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        stride = data.draw(st.integers(max(cols, 1), 8))
        reach = max(0, rows - 1) * stride + cols
        if reach > typed.numel():
            rows, reach = 1, cols
        offset = data.draw(st.integers(0, typed.numel() - reach))
        tensor = typed.as_strided((rows, cols), (stride, 1), offset)
        size = tensor.element_size()
        runs = ((offset + row * stride) * size for row in range(rows))
        return tensor, {byte for start in runs for byte in range(start, start + cols * size)}

    (one, bytes_of_one), (two, bytes_of_two) = draw(), draw()
    if bytes_of_one & bytes_of_two:
        with pytest.raises(ValueError, match="overlaps"):
            check_disjoint({"a": one, "b": two}, {})
    else:
        check_disjoint({"a": one, "b": two}, {})
