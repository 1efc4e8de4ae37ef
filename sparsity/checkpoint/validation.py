"""Whether the tensors of a compressed weight say what they may: indices, counts, offsets and the hash of the mask.

Everything is checked before a kernel sees it: an index out of range would read memory that is not the weight's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trisparse.kernels.compressed import TILE, tile_dtype
from trisparse.sparsity.checkpoint.target import Target, TargetError
from trisparse.sparsity.mask import bits_sha256
from trisparse.sparsity.pattern import NM, Pattern, Rows


def check_positions(target: Target, positions: Mapping[str, Tensor]) -> Tensor | None:
    """Check the tensors on the CPU that say which weights are kept; the mask must have the target's hash.

    Args:
        target: what they are to be.
        positions: ``meta``, or ``bitmask`` and for format "bitmask" ``row_offsets``.

    Returns:
        The tile offsets (kernels/compressed.py) of format "bitmask"; None for the others.

    Raises:
        TargetError: what is wrong.
    """
    for part, (dtype, shape) in target.tensors.items():
        if part != "values" and (positions[part].dtype != dtype or tuple(positions[part].shape) != shape):
            found = positions[part]
            raise TargetError(f"{part} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
    tiles = None
    if target.format == "2:4":
        packed = packed_of_meta(positions["meta"])
    else:
        packed = positions["bitmask"]
        _check_padding(target, packed)
        if target.format == "n:m":
            _check_groups(target.pattern, packed, target.cols)
        else:
            check_pattern(target.pattern, packed, target.cols)
            tiles = _check_offsets(target, packed, positions["row_offsets"])
    if bits_sha256(packed, target.shape, target.cols, target.transposed) != target.sha256:
        raise TargetError("the mask does not match its hash")
    return tiles


def check_mask(target: Target, bits: Tensor) -> None:
    """Check the mask, uint8 [rows, ceil(cols / 8)] on the CPU, of a weight that is stored dense.

    Raises:
        TargetError: what is wrong.
    """
    if bits.dtype != torch.uint8 or tuple(bits.shape) != target.bits_shape:
        raise TargetError(f"its mask is {bits.dtype} {tuple(bits.shape)}, not torch.uint8 {target.bits_shape}")
    _check_padding(target, bits)
    kept = int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))
    if kept != target.kept:
        raise TargetError(f"its mask keeps {kept} weights, not {target.kept}")
    check_pattern(target.pattern, bits, target.cols)
    if bits_sha256(bits, target.shape, target.cols, target.transposed) != target.sha256:
        raise TargetError("the mask does not match its hash")


def check_pattern(pattern: Pattern, packed: Tensor, cols: int) -> None:
    """Check that the packed mask uint8 [rows, ceil(cols / 8)] on the CPU is of the structure of ``pattern``.

    Raises:
        TargetError: a group of an n:m pattern keeps another number, or a row is pruned in part where rows are whole.
    """
    if isinstance(pattern, Rows):
        of_row = np.bitwise_count(packed.numpy()).sum(1, dtype=np.int64)
        if bool(((of_row != 0) & (of_row != cols)).any()):
            raise TargetError(f"the bitmask is not {pattern}")
    elif isinstance(pattern, NM):
        _check_groups(pattern, packed, cols)


def packed_of_meta(meta: Tensor) -> Tensor:
    """The packed mask uint8 [rows, cols / 8] of 2:4 ``meta`` int16 [rows, cols / 16] on the CPU.

    Raises:
        TargetError: a group whose two places do not ascend.
    """
    words = np.ascontiguousarray(meta.numpy()).view(np.uint16)
    packed = np.take(_packed_words(), words)
    if not packed.all():
        raise TargetError("meta has a group whose two places do not ascend")
    return torch.from_numpy(packed.view(np.uint8))


@cache
def _packed_words() -> npt.NDArray[np.uint16]:
    """For each word of meta the 16 bits of the mask; 0 for a word with a group that does not ascend."""
    words = np.arange(1 << 16, dtype=np.uint32)
    packed = np.zeros_like(words)
    good = np.ones(1 << 16, dtype=bool)
    for group in range(4):
        low, high = words >> 4 * group & 3, words >> 4 * group + 2 & 3
        good &= low < high
        packed |= (1 << low | 1 << high) << 4 * group
    return np.where(good, packed, 0).astype("<u2").astype(np.uint16)


def _check_padding(target: Target, packed: Tensor) -> None:
    beyond = target.cols % 8
    if beyond and bool((packed[:, -1] >> beyond).any()):
        raise TargetError("the bitmask has bits beyond the last column")


def _check_groups(pattern: Pattern, packed: Tensor, cols: int) -> None:
    """Exactly n of every m consecutive columns are kept, in whole groups."""
    assert isinstance(pattern, NM)  # or the format would be another
    n, m = pattern.n, pattern.m
    bits = packed.numpy()
    if m in (8, 16, 32) and cols % m == 0:
        counts = np.bitwise_count(np.ascontiguousarray(bits).view(f"u{m // 8}"))
    else:
        counts = np.unpackbits(bits, axis=1, count=cols // m * m, bitorder="little").reshape(-1, m).sum(1)
    if bool((counts != n).any()):
        raise TargetError(f"the bitmask is not {pattern}")


def _check_offsets(target: Target, packed: Tensor, row_offsets: Tensor) -> Tensor:
    """The tile offsets, after a check that ``row_offsets`` are those of the bitmask."""
    tiles = -(-target.cols // TILE)
    bits = np.ascontiguousarray(packed.numpy())
    if bits.shape[1] % 8:
        bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    words = np.bitwise_count(bits.view(np.uint64))
    counts = words[:, ::2].copy()  # of each tile, two words: at most 128, which a byte holds
    counts[:, : words.shape[1] // 2] += words[:, 1::2]
    expected = np.zeros(target.rows + 1, dtype=np.int64)
    np.cumsum(counts.sum(1, dtype=np.int64), out=expected[1:])
    if not np.array_equal(row_offsets.numpy(), expected):
        raise TargetError("row_offsets do not fit the bitmask")
    if int(expected[-1]) != target.kept:
        raise TargetError(f"the bitmask keeps {int(expected[-1])} weights, not {target.kept}")
    # Unsigned sums wrap: the low 16 bits are what the kernels read, as in kernels/compressed.py.
    unsigned = np.uint16 if tile_dtype(target.cols) == torch.int16 else np.uint32
    before = np.zeros((target.rows, tiles), dtype=unsigned)
    np.cumsum(counts[:, :-1], axis=1, dtype=unsigned, out=before[:, 1:])
    return torch.from_numpy(before).view(tile_dtype(target.cols))
