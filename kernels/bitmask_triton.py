# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of packed masks; the operations, their references and formats are in kernels/bitmask.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch

_COLS = 1024  # columns of a program: 8 a thread, so that a thread has whole bytes


@triton.jit
def merge_bits(word, G: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Neighbouring words of BITS bits put together, the first lowest, until they have WIDTH bits."""
    if BITS >= WIDTH:
        return word
    else:
        low, high = tl.split(tl.reshape(word, [G // 2, 2]))
        return merge_bits(low | (high << BITS), G // 2, BITS * 2, WIDTH)


@triton.jit
def pack_kernel(mask_ptr, packed_ptr, cols, stride_m, BLOCK: tl.constexpr):
    """mask [rows, cols] bytes, rows stride_m apart -> packed [rows, ceil(cols / 8)]."""
    blocks = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK
    i = col + tl.arange(0, BLOCK)
    bits = tl.load(mask_ptr + row * stride_m + i, mask=i < cols, other=0).to(tl.int32)
    bits = tl.reshape(bits, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
    j = col // 8 + tl.arange(0, BLOCK // 8)
    row_bytes = tl.cdiv(cols, 8)
    tl.store(packed_ptr + row * row_bytes + j, tl.sum(bits, 1).to(tl.uint8), mask=j < row_bytes)


@triton.jit
def unpack_kernel(
    packed_ptr,  # [rows, ceil(cols / 8)], rows stride_p apart
    out_ptr,  # [rows, cols], rows stride_o apart: bytes 0 and 1, or with APPLY a weight zeroed in place
    cols,
    stride_p,
    stride_o,
    APPLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unpack, or zero the weights whose bit is 0."""
    blocks = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK
    i = col + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + row * stride_p + i // 8, mask=i < cols, other=0).to(tl.int32)
    bit = (byte >> (i % 8)) & 1
    at = out_ptr + row * stride_o + i
    if APPLY:
        w = tl.load(at, mask=i < cols, other=0.0)
        tl.store(at, tl.where(bit != 0, w, 0.0).to(w.dtype), mask=i < cols)
    else:
        tl.store(at, bit.to(tl.uint8), mask=i < cols)


@triton.jit
def count_kernel(packed_ptr, count_ptr, row_bytes, stride_p, BLOCK: tl.constexpr):
    """packed [rows, row_bytes], rows stride_p apart -> the bits set in each row, int64 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, row_bytes, BLOCK):
        j = start + tl.arange(0, BLOCK)
        v = tl.load(packed_ptr + row * stride_p + j, mask=j < row_bytes, other=0).to(tl.int32)
        v = v - ((v >> 1) & 0x55)
        v = (v & 0x33) + ((v >> 2) & 0x33)
        total += (v & 0xF) + (v >> 4)
    tl.store(count_ptr + row, tl.sum(total, 0).to(tl.int64))


@triton.jit
def move_kernel(
    packed_ptr,  # [rows, ceil(cols / 8)], rows stride_p apart
    offset_ptr,  # [rows + 1] int64: where each row's values begin
    values_ptr,  # [kept]
    dense_ptr,  # [rows, cols], rows stride_d apart
    cols,
    stride_p,
    stride_d,
    COMPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of the dense weight into its values (COMPRESS) or back, in row order."""
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(offset_ptr + row)
    for start in range(0, cols, BLOCK):
        i = start + tl.arange(0, BLOCK)
        byte = tl.load(packed_ptr + row * stride_p + i // 8, mask=i < cols, other=0).to(tl.int32)
        bit = tl.where(i < cols, (byte >> (i % 8)) & 1, 0)
        place = base + tl.cumsum(bit, 0) - 1
        if COMPRESS:
            w = tl.load(dense_ptr + row * stride_d + i, mask=bit != 0, other=0.0)
            tl.store(values_ptr + place, w, mask=bit != 0)
        else:
            w = tl.load(values_ptr + place, mask=bit != 0, other=0.0)
            tl.store(dense_ptr + row * stride_d + i, w, mask=i < cols)
        base += tl.sum(bit, 0)


def _grid(rows: int, cols: int) -> tuple[int]:
    return (rows * triton.cdiv(cols, _COLS),)


def pack_triton(mask: Tensor, packed: Tensor) -> None:
    """mask [rows, cols] bool -> packed, contiguous."""
    rows, cols = mask.shape
    launch(pack_kernel, _grid(rows, cols), mask.view(torch.uint8), packed, cols, mask.stride(0), BLOCK=_COLS)


def unpack_triton(packed: Tensor, out: Tensor, apply: bool) -> None:
    """packed -> out bool [rows, cols]; with ``apply``, out is a weight that is zeroed in place."""
    rows, cols = out.shape
    target = out if apply else out.view(torch.uint8)
    launch(
        unpack_kernel,
        _grid(rows, cols),
        packed,
        target,
        cols,
        packed.stride(0),
        out.stride(0),
        APPLY=apply,
        BLOCK=_COLS,
    )


def count_triton(packed: Tensor, count: Tensor) -> None:
    """packed [rows, bytes] -> count int64 [rows]."""
    rows, row_bytes = packed.shape
    launch(count_kernel, (rows,), packed, count, row_bytes, packed.stride(0), BLOCK=512)


def move_triton(packed: Tensor, offsets: Tensor, values: Tensor, dense: Tensor, compress: bool) -> None:
    """dense -> values (``compress``) or values -> dense."""
    rows, cols = dense.shape
    launch(
        move_kernel,
        (rows,),
        packed,
        offsets,
        values,
        dense,
        cols,
        packed.stride(0),
        dense.stride(0),
        COMPRESS=compress,
        BLOCK=_COLS,
    )
