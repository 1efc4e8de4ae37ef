"""The 2:4 metadata words against torch's own converter, whose reordering for CUTLASS is undone."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
)

from trisparse.kernels.nm import mask_2_4, meta_2_4, select_nm, select_nm_ref


def torch_words(pruned):
    """(values, words [rows, cols / 16] in row order) of a 2:4 sparse weight, by torch."""
    values, reordered = sparse_semi_structured_from_dense_cutlass(pruned)
    rows, words = reordered.shape
    places = _calculate_meta_reordering_scatter_offsets(rows, words, reordered.dtype, reordered.device)
    return values, reordered.view(-1)[places].view(rows, words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 64), (32, 128), (96, 192), (128, 1024), (256, 11008)])
def test_words_equal_torchs(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    weight = torch.where(weight == 0, 1, weight).to(dtype)  # torch infers the mask from what is not zero
    expected = weight.masked_fill(~select_nm_ref(weight, 2, 4), 0)
    values, meta = select_nm(weight, 2, 4, out="compressed", apply=True)
    assert torch.equal(weight, expected)
    torch_values, words = torch_words(weight)
    assert meta.dtype == words.dtype == torch.int16
    assert torch.equal(meta, words)
    assert torch.equal(values, torch_values)


def test_every_pair_of_places():
    """All six pairs in each of the four nibbles of a word; the fourth nibble makes words negative."""
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    mask = torch.zeros(32, 64, dtype=torch.bool)
    for group in range(32 * 16):
        row, start = group // 16, group % 16 * 4
        i, j = pairs[(group * 7 + group // 16) % 6]
        mask[row, start + i] = mask[row, start + j] = True
    _, words = torch_words(mask.half())
    assert (words < 0).any()
    assert torch.equal(meta_2_4(mask), words)
    assert torch.equal(mask_2_4(words), mask)


def test_by_hand():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    # i0 | i1 << 2: 0 1 -> 4, 0 2 -> 8, 1 2 -> 9, 2 3 -> 14
    assert meta_2_4(mask).tolist() == [[0xE984 - 0x10000]]
    assert torch.equal(mask_2_4(meta_2_4(mask)), mask)
