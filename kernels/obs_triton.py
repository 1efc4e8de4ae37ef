# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc, var-annotated"
# ruff: noqa: RUF005 (the forms that Triton compiles)
"""Triton kernel of the OBS update of one block; the operation and its reference are in kernels/obs.py.

A thread has a row, and takes it through the whole block in sub-blocks of STEP columns, which it holds as planes: plane
j is a tensor [ROWS] of the j-th columns of many rows (see kernels/nm_triton.py). A sub-block first takes the errors of
all columns before it; then its columns follow one another, n:m is chosen where a group begins, and each error is passed
on, all within the thread. So no column waits for another thread.

W is read once and written once, and so are the mask and the errors; only the errors are read back, from the caches, by
the program that wrote them. U is read by every program from the caches, 16 bytes for four products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trisparse.kernels.launch import launch
from trisparse.kernels.nm_triton import join_planes, split_planes

ROWS = 32  # of a program: a warp, with a row to each thread; 4096 rows give 128 programs, about one for each SM
STEP = (
    8  # columns of a sub-block, or a group that is larger: 16 issue a tenth less, but take 3 times as long to compile
)
UNROLL = 4  # columns before a sub-block whose errors and factors are loaded together: one wait serves them all


@triton.jit
def _store_planes(ptr, planes, at, mask, COUNT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Write COUNT planes [ROWS], padded to SIZE with the last, as a tile to ptr + at [ROWS, SIZE] under ``mask``."""
    for _ in tl.static_range(COUNT, SIZE):
        planes = planes + (planes[COUNT - 1],)
    tl.store(ptr + at, join_planes(planes, ROWS, SIZE), mask=mask)


@triton.jit
def _factors(u_ptr, first, block, FROM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Planes FROM .. SIZE - 1 of a row of U from column ``first`` on, FROM a multiple of 4; 0 beyond the block.

    Every thread loads the same 16 bytes: as a tile of equal rows, since four scalars would be four loads.
    """
    out = ()
    for q in tl.static_range(FROM, SIZE, 4):
        c = first + q + tl.arange(0, 4)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        out = out + split_planes(tl.load(u_ptr + c, mask=c < block, other=0.0), ROWS, 4)
    return out


@triton.jit
def obs_block_kernel(
    w_ptr,  # [rows, block] fp32
    out_ptr,  # [rows, block] fp32, may be w_ptr
    u_ptr,  # [block, block] fp32, upper triangular, rows stride_u apart
    mask_ptr,  # [rows, block] bytes 0 and 1: read, or with N > 0 written
    e_ptr,  # [block, rows] fp32, contiguous: written, and read back by the program that wrote it
    rows,
    block,
    stride_wr,
    stride_wc,
    stride_or,
    stride_oc,
    stride_mr,
    stride_mc,
    stride_u,
    N: tl.constexpr,  # 0: the mask is given
    M: tl.constexpr,
    STEP: tl.constexpr,  # columns of a sub-block, whole groups of M
    SIZE: tl.constexpr,  # STEP, rounded up to a power of two
    UNROLL: tl.constexpr,  # divides STEP
    ROWS: tl.constexpr,
):
    """Prune and update ROWS rows of a block, from the first column to the last."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    some = row < rows
    c = tl.arange(0, SIZE)
    for first in range(0, block, STEP):
        column = (first + c).to(tl.int64)
        inside = some[:, None] & ((c < STEP) & (first + c < block))[None, :]
        tile = tl.load(w_ptr + row[:, None] * stride_wr + column[None, :] * stride_wc, mask=inside, other=0.0)
        w = split_planes(tile, ROWS, SIZE)
        for start in range(0, first, UNROLL):
            e_row = e_ptr + tl.cast(start, tl.int64) * rows + row
            u_row = u_ptr + tl.cast(start, tl.int64) * stride_u
            for i in tl.static_range(UNROLL):
                e = tl.load(e_row + i * rows, mask=some, other=0.0)
                u = _factors(u_row + i * stride_u, first, block, 0, SIZE, ROWS)
                for k in tl.static_range(STEP):
                    w = w[:k] + (w[k] - e * u[k],) + w[k + 1 :]
        at_mask = row[:, None] * stride_mr + column[None, :] * stride_mc
        kept = ()
        if N == 0:
            given = split_planes(tl.load(mask_ptr + at_mask, mask=inside, other=1), ROWS, SIZE)
            for j in tl.static_range(STEP):
                kept = kept + (given[j] != 0,)
        scale = ()
        for j in tl.static_range(STEP):
            at = tl.minimum(first + j, block - 1)
            scale = scale + (tl.div_rn(1.0, tl.load(u_ptr + at * (stride_u + 1))),)
        out = ()
        for j in tl.static_range(STEP):
            if N > 0 and j % M == 0:
                # Magnitudes order as their bits do. An element is kept when fewer than N of its group come before it.
                key = ()
                before = ()
                for i in tl.static_range(M):
                    key = key + ((tl.abs(w[j + i]) * scale[j + i]).to(tl.int32, bitcast=True),)
                    before = before + (tl.zeros([ROWS], tl.int32) + (M - 1 - i),)
                for i in tl.static_range(M):
                    for k in tl.static_range(i + 1, M):
                        wins = (key[i] >= key[k]).to(tl.int32)
                        before = before[:i] + (before[i] - wins,) + before[i + 1 :]
                        before = before[:k] + (before[k] + wins,) + before[k + 1 :]
                for i in tl.static_range(M):
                    kept = kept + (before[i] < N,)
            e = tl.where(kept[j], 0.0, w[j]) * scale[j]
            tl.store(e_ptr + tl.cast(first + j, tl.int64) * rows + row, e, mask=some & (first + j < block))
            out = out + (tl.where(kept[j], w[j], 0.0),)
            u_row = u_ptr + tl.minimum(first + j, block - 1) * stride_u
            u = _factors(u_row, first, block, (j + 1) // 4 * 4, SIZE, ROWS)
            for k in tl.static_range(j + 1, STEP):
                w = w[:k] + (w[k] - e * u[k - (j + 1) // 4 * 4],) + w[k + 1 :]
        _store_planes(out_ptr, out, row[:, None] * stride_or + column[None, :] * stride_oc, inside, STEP, SIZE, ROWS)
        if N > 0:
            bits = ()
            for j in tl.static_range(STEP):
                bits = bits + (kept[j].to(tl.uint8),)
            _store_planes(mask_ptr, bits, at_mask, inside, STEP, SIZE, ROWS)
        tl.debug_barrier()  # so that the errors can be read back whichever thread stored them


def obs_block_triton(
    weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int, updated: Tensor, errors: Tensor, chosen: Tensor
) -> None:
    """Launch the kernel on checked arguments; ``errors`` are stored by columns, all else as its strides say."""
    rows, block = weight.shape
    bits = (chosen if mask is None else mask).view(dtype=torch.uint8)
    step = STEP if mask is not None else m * max(1, STEP // m)  # whole groups
    launch(
        obs_block_kernel,
        (triton.cdiv(rows, ROWS),),
        weight,
        updated,
        factor,
        bits,
        errors,
        rows,
        block,
        *weight.stride(),
        *updated.stride(),
        *bits.stride(),
        factor.stride(0),
        N=n,
        M=m,
        STEP=step,
        SIZE=triton.next_power_of_2(step),
        UNROLL=max(d for d in range(1, UNROLL + 1) if step % d == 0),
        ROWS=ROWS,
        num_warps=1,
    )
