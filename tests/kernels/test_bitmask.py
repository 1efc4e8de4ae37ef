"""Packed masks: by hand, there and back, and route against reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trisparse.kernels.bitmask import (
    count_bits,
    count_bits_ref,
    pack_bits,
    pack_bits_ref,
    unpack_bits,
    unpack_bits_ref,
)


@pytest.mark.parametrize(
    ("pack", "unpack", "count"),
    [(pack_bits_ref, unpack_bits_ref, count_bits_ref), (pack_bits, unpack_bits, count_bits)],
)
def test_by_hand(pack, unpack, count):
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b00001101, 0b10], [0b10000000, 0]]
    assert torch.equal(unpack(packed, 10), mask)
    assert count(packed).dtype == torch.int64
    assert count(packed).tolist() == [4, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(0, 70), st.integers(0, 3))
def test_there_and_back(rows, cols, seed):
    mask = torch.rand(rows, cols + 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask[:, 1 : 1 + cols]
    packed = pack_bits(mask)
    assert packed.shape == (rows, -(-cols // 8))
    assert torch.equal(packed, pack_bits_ref(mask))
    assert torch.equal(unpack_bits(packed, cols), mask)
    assert torch.equal(unpack_bits_ref(packed, cols), mask)
    assert torch.equal(count_bits(packed), mask.sum(1))
    assert torch.equal(count_bits_ref(packed), mask.sum(1))


@pytest.mark.parametrize("pack", [pack_bits, pack_bits_ref])
def test_wrong_mask(pack):
    with pytest.raises(ValueError, match=r"mask has dtype torch\.float32"):
        pack(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"mask has shape \(8,\)"):
        pack(torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask has strides"):
        pack(torch.ones(8, 8, dtype=torch.bool).T)


@pytest.mark.parametrize(
    ("unpack", "count"), [(unpack_bits, count_bits), (unpack_bits_ref, count_bits_ref)], ids=["route", "ref"]
)
def test_wrong_packed(unpack, count):
    packed = torch.zeros(2, 2, dtype=torch.uint8)
    for cols in (8, 17, -1, 9.0, True):
        with pytest.raises(ValueError, match=r"cols is .*; 2 bytes a row hold 9\.\.16 columns"):
            unpack(packed, cols)
    for wrong, message in ((packed.int(), "dtype torch"), (packed[0], "shape"), (packed[:, :2].T, "strides")):
        with pytest.raises(ValueError, match=rf"packed has {message}"):
            count(wrong)
        with pytest.raises(ValueError, match=rf"packed has {message}"):
            unpack(wrong, 16)
