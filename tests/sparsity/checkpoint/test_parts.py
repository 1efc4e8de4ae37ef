import pytest
import torch

from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.compressed import compress
from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.checkpoint.parts import (
    LayerParts,
    Share,
    concatenate_rows,
    cut_columns,
    cut_rows,
    share_of_rank,
)
from trisparse.sparsity.checkpoint.target import Target
from trisparse.sparsity.linear import storage_format
from trisparse.sparsity.mask import Mask
from trisparse.sparsity.pattern import parse_pattern


def weight_of(pattern, rows, cols, seed=0):
    """A random compressed weight, its dense form and its mask; one kept weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=generator)
    made = parse_pattern(pattern)
    keep = torch.rand(rows, cols, generator=generator) < 0.4
    if hasattr(made, "m"):
        order = torch.rand(rows, cols // made.m, made.m, generator=generator).argsort(-1)
        keep = (order < made.n).reshape(rows, cols)
    dense *= keep
    dense[tuple(keep.nonzero()[-1])] = 0
    return compress(dense, pack_bits(keep), *storage_format(made, cols)), dense, keep


def test_rows_and_columns_by_hand():
    dense = torch.tensor([[1.0, 0, 0, 4], [0, 0, 0, 0], [0, 2, 3, 0]])
    keep = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)  # keeps a zero in row 2
    weight = compress(dense, pack_bits(keep), "bitmask")
    lower = cut_rows(weight, 1, 3)
    assert (lower.values.tolist(), lower.row_offsets.tolist()) == ([0, 2, 3], [0, 0, 3])
    both = concatenate_rows([lower, weight])
    assert both.values.tolist() == [0, 2, 3, 1, 4, 0, 2, 3]
    assert both.row_offsets.tolist() == [0, 0, 3, 5, 5, 8]
    assert both.meta.flatten().tolist() == [0, 7, 9, 0, 7]
    right = cut_columns(weight, 2, 4, parse_pattern("50%"))
    assert (right.values.tolist(), right.row_offsets.tolist()) == ([4, 3], [0, 1, 1, 2])
    assert right.meta.flatten().tolist() == [2, 0, 1]


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "50%"])
def test_rows_put_together_and_columns_cut(pattern):
    # 1:8 has 8 and 2:4 has 16 columns to a word; 208 columns have two tile offsets.
    parts = [weight_of(pattern, rows, 208, seed) for seed, rows in enumerate((5, 1, 7))]
    whole = concatenate_rows([weight for weight, _, _ in parts])
    dense, keep = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    expected = compress(dense, pack_bits(keep), *storage_format(parse_pattern(pattern), 208))
    for name in ("values", "meta", "row_offsets", "tile_offsets"):
        found, wanted = getattr(whole, name), getattr(expected, name)
        assert (found is None and wanted is None) or torch.equal(found, wanted), name
    for start, stop in ((0, 104), (104, 208), (0, 208), (48, 96)):
        cut = cut_columns(whole, start, stop, parse_pattern(pattern))
        assert cut.format == storage_format(parse_pattern(pattern), stop - start)[0]
        assert torch.equal(cut.decompress(), dense[:, start:stop])
        packed = pack_bits(keep[:, start:stop].contiguous())
        assert torch.equal(cut.packed, packed)


def test_a_cut_has_memory_of_its_own():
    weight, dense, _ = weight_of("50%", 6, 64)
    cut = cut_rows(weight, 2, 4)
    weight.values.zero_()
    assert torch.equal(cut.decompress(), dense[2:4])
    assert cut.values.untyped_storage().nbytes() == cut.values.nbytes


def test_columns_inside_of_a_group_and_rows_of_two_forms_are_refused():
    weight, _, _ = weight_of("2:4", 4, 64)
    with pytest.raises(ValueError, match="exactly 2 of every 4"):
        cut_columns(weight, 2, 34, parse_pattern("2:4"))
    with pytest.raises(ValueError, match="no common form"):
        concatenate_rows([weight, weight_of("1:4", 4, 64)[0]])


@pytest.mark.parametrize(
    ("size", "held", "ranks", "starts"),
    [
        (64, 32, 2, [0, 32]),  # each its own
        (64, 64, 3, [0, 0, 0]),  # all have everything
        (32, 16, 4, [0, 0, 16, 16]),  # two heads of keys for four devices
        (16, 16, 1, [0]),
    ],
)
def test_share_of_rank(size, held, ranks, starts):
    assert [share_of_rank(size, held, rank, ranks) for rank in range(ranks)] == [(s, s + held) for s in starts]


@pytest.mark.parametrize(("size", "held", "ranks"), [(64, 48, 2), (64, 16, 2), (64, 0, 2), (64, 128, 1), (96, 32, 4)])
def test_sizes_that_are_not_split_over_the_devices(size, held, ranks):
    with pytest.raises(ValueError, match=f"{size} rows or columns are not split over {ranks} devices by {held}"):
        share_of_rank(size, held, 0, ranks)


def share(pattern, rows, cols):
    weight, dense, keep = weight_of(pattern, rows, cols)
    mask = Mask.from_matrix(keep, dense.shape, parse_pattern(pattern))
    return weight, dense, Share("q.weight", Target.of(mask, weight.format), (0, rows), (0, cols))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_checked_and_copied_as_they_come(dtype):
    weight, dense, one = share("50%", 4, 48)
    parts = LayerParts([one], device=torch.device("cpu"), dtype=dtype)
    assert parts.tensors == {"values": dtype, "bitmask": torch.uint8, "row_offsets": torch.int64}
    values = weight.values.clone()
    parts.add(0, "values", values)
    values.zero_()  # what reads the files may use its memory again
    with pytest.raises(CheckpointError, match=r"values of q\.weight came twice"):
        parts.add(0, "values", values)
    with pytest.raises(CheckpointError, match="stored as 'bitmask', which has no meta"):
        parts.add(0, "meta", weight.meta)
    with pytest.raises(CheckpointError, match=r"bitmask is torch.int8 \(4, 6\), not torch.uint8 \(4, 6\)"):
        parts.add(0, "bitmask", weight.meta.view(torch.int8))
    with pytest.raises(CheckpointError, match=r"has no bitmask of q\.weight, row_offsets of q\.weight"):
        parts.finish()
    parts.add(0, "row_offsets", weight.row_offsets)
    parts.add(0, "bitmask", weight.meta)
    layer = parts.finish("memory")
    assert torch.equal(layer.weight, dense.to(dtype))
    assert layer.prefer == "memory"
    with pytest.raises(CheckpointError, match="the checkpoint has no"):
        parts.finish()
