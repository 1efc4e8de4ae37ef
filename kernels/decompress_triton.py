# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
"""A dense tile of a compressed weight, in registers; the forms are in kernels/compressed.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """How many bits of uint32 words are set. LLVM recognises this form and makes it one instruction, popc."""
    v = word - ((word >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _words(meta_ptr, row, index, cols, WORDS: tl.constexpr):
    """uint32 words `index` (of 32 columns) of packed rows; 0 outside of the row. row and index broadcast."""
    if WORDS:  # rows of whole, aligned words
        inside = (index >= 0) & (index < cols // 32)
        word = tl.load(meta_ptr.to(tl.pointer_type(tl.uint32)) + row * (cols // 32) + index, mask=inside, other=0)
    else:
        row_bytes = (cols + 7) // 8
        word = tl.zeros_like(row * 0 + index).to(tl.uint32)
        for b in tl.static_range(4):
            at = index * 4 + b
            byte = tl.load(meta_ptr + row * row_bytes + at, mask=(at >= 0) & (at < row_bytes), other=0)
            word |= byte.to(tl.uint32) << (8 * b)
    return word


@triton.jit
def _tile_2_4(values_ptr, meta_ptr, row, col, cols, R: tl.constexpr, C: tl.constexpr):
    """The dense tile of 2:4: a thread expands whole groups, so that nothing leaves its registers."""
    i = col // 2 + tl.arange(0, C // 2)
    v = tl.load(values_ptr + row[:, None] * (cols // 2) + i[None, :], mask=(i < cols // 2)[None, :], other=0.0)
    j = col // 16 + tl.arange(0, C // 16)
    word = tl.load(meta_ptr + row[:, None] * (cols // 16) + j[None, :], mask=(j < cols // 16)[None, :], other=0)
    nibble = tl.reshape(word.to(tl.int32)[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :], [R, C // 4])
    i0, i1 = nibble & 3, (nibble >> 2) & 3
    v0, v1 = tl.split(tl.reshape(v, [R, C // 4, 2]))
    zero = tl.zeros_like(v0)
    d0 = tl.where(i0 == 0, v0, zero)
    d1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
    d2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
    d3 = tl.where(i1 == 3, v1, zero)
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), [R, C])


@triton.jit
def _tile_masked(values_ptr, meta_ptr, row, col, cols, R: tl.constexpr, C: tl.constexpr):
    i = col + tl.arange(0, C)
    v = tl.load(values_ptr + row[:, None] * cols + i[None, :], mask=(i < cols)[None, :], other=0.0)
    row_bytes = (cols + 7) // 8
    j = col // 8 + tl.arange(0, C // 8)
    byte = tl.load(meta_ptr + row[:, None] * row_bytes + j[None, :], mask=(j < row_bytes)[None, :], other=0)
    bit = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bit, [R, C]) != 0, v, tl.zeros_like(v))


@triton.jit
def _tile_ranked(
    values_ptr, meta_ptr, row_offset_ptr, tile_offset_ptr, row, col, cols,
    FORMAT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The dense tile of "n:m" or "bitmask".

    A kept weight lies as far behind the first of its tile as there are bits set between them: those of the words
    before, and those below its own bit.
    """
    if FORMAT == "bitmask":
        tiles = (cols + 127) // 128
        rank = tl.load(tile_offset_ptr + row * tiles + col // 128).to(tl.int32)
        if tile_offset_ptr.dtype.element_ty == tl.int16:
            rank = rank & 0xFFFF  # stored unsigned
        if C % 128 != 0:  # the tile may begin inside of the 128 columns
            before = col // 128 * 4 + tl.arange(0, 4)
            inner = _words(meta_ptr, row[:, None], before[None, :], cols, WORDS)
            rank += tl.sum(tl.where((before < col // 32)[None, :], popcount(inner), 0), 1)
        base = tl.load(row_offset_ptr + row)
    else:
        base = row * (cols // M * N)
        rank = col // M * N + tl.zeros([R], tl.int32)
        if C % M != 0:  # a group, at most 32 columns, may reach into the tile from the left
            left = col % M
            word = _words(meta_ptr, row, col // 32 - 1, cols, WORDS)
            rank += tl.where(left != 0, popcount(word >> (32 - tl.maximum(left, 1)).to(tl.uint32)), 0)
    words = _words(meta_ptr, row[:, None], (col // 32 + tl.arange(0, C // 32))[None, :], cols, WORDS)
    count = popcount(words)
    rank = rank[:, None] + tl.cumsum(count, 1) - count
    rank = tl.reshape(tl.broadcast_to(rank[:, :, None], [R, C // 32, 8]), [R, C // 4])
    # A thread takes four neighbouring columns, so that it counts once, and a warp reads one row's values. It reads
    # its word again, which the cache holds: that takes less than passing it through shared memory.
    q = tl.arange(0, C // 4)
    words = _words(meta_ptr, row[:, None], (col // 32 + q // 8)[None, :], cols, WORDS)
    shift = (q % 8 * 4).to(tl.uint32)[None, :]
    rank += popcount(words & ((1 << shift) - 1))
    nibble = (words >> shift).to(tl.int32)
    at = (values_ptr + base)[:, None] + rank
    k0, k1, k2, k3 = nibble & 1, (nibble >> 1) & 1, (nibble >> 2) & 1, (nibble >> 3) & 1
    d0 = tl.load(at, mask=k0 != 0, other=0.0)
    d1 = tl.load(at + k0, mask=k1 != 0, other=0.0)
    d2 = tl.load(at + (k0 + k1), mask=k2 != 0, other=0.0)
    d3 = tl.load(at + (k0 + k1 + k2), mask=k3 != 0, other=0.0)
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), [R, C])


@triton.jit
def dense_tile(
    values_ptr,  # the values of a CompressedWeight
    meta_ptr,  # its meta
    row_offset_ptr,  # int64 [rows + 1], "bitmask" only
    tile_offset_ptr,  # int16 or int32 [rows, ceil(cols / 128)], "bitmask" only
    row,  # [R] int64, each a row that exists
    col,  # the first column, a multiple of C
    cols,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WORDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The dense tile [R, C] at (row, col), 0 beyond the last column."""
    if FORMAT == "2:4":
        w = _tile_2_4(values_ptr, meta_ptr, row, col, cols, R, C)
    elif FORMAT == "masked":
        w = _tile_masked(values_ptr, meta_ptr, row, col, cols, R, C)
    else:
        w = _tile_ranked(
            values_ptr, meta_ptr, row_offset_ptr, tile_offset_ptr, row, col, cols, FORMAT, N, M, WORDS, R, C
        )
    return w
